"""Samplers in the space of x = sqrt(a) x0 + sqrt(1 - a) epsilon, a being alphas_cumprod: each is the function that
makes its table of weights (`steps.py`), with diffusers' conventions."""

import itertools
from collections.abc import Sequence

import numpy as np

from ipadapter_jax.diffusion.sampler_table import KEPT, M0, M1, M2, M3, M4, OUTPUT, SamplerStep, X
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.strings import short_repr


def clean(schedule: NoiseSchedule, a: float) -> tuple[float, float]:
    """x0 = this[0] x + this[1] output. For v-prediction see arXiv 2202.00512, appendix D."""
    with np.errstate(divide="ignore"):
        return {
            "epsilon": (1 / np.sqrt(a), -np.sqrt(1 - a) / np.sqrt(a)),
            "v_prediction": (np.sqrt(a), -np.sqrt(1 - a)),
            "sample": (0.0, 1.0),
        }[schedule.prediction_type]


def level(a: float) -> tuple[float, float]:
    """Image and noise in x."""
    return float(np.sqrt(a)), float(np.sqrt(1 - a))


def epsilon(schedule: NoiseSchedule, a: float) -> np.ndarray:
    """The noise in x, as a row of weights."""
    if schedule.prediction_type == "sample":
        return (X - np.sqrt(a) * OUTPUT) / np.sqrt(1 - a)
    return OUTPUT if schedule.prediction_type == "epsilon" else np.sqrt(a) * OUTPUT + np.sqrt(1 - a) * X


def _ends(
    schedule: NoiseSchedule, timesteps: np.ndarray, num_steps: int, last: float
) -> list[tuple[int, float, float]]:
    """(timestep, a there, a where the step ends); `last` lies beyond timestep 0."""
    a = schedule.alphas_cumprod.astype(np.float64)
    if max(timesteps) >= len(a):
        raise InputError(
            f"scheduler config: steps_offset={schedule.steps_offset} exceeds the {len(a)} training timesteps; use "
            "fewer steps or mend it"
        )
    ends = timesteps - schedule.num_train_timesteps // num_steps
    return [(t, float(a[t]), float(a[end]) if end >= 0 else last) for t, end in zip(timesteps, ends, strict=True)]


def ddim(schedule: NoiseSchedule, num_steps: int, first: int = 0, eta: float = 0.0) -> tuple[list[SamplerStep], float]:
    """arXiv 2010.02502, equation 12; eta 0 is deterministic, 1 has the variance of DDPM (equation 16)."""
    rows = []
    timesteps, last = schedule.timesteps(num_steps), float(schedule.final_alpha_cumprod)
    for t, a, b in _ends(schedule, timesteps, num_steps, last):
        sigma = eta * np.sqrt(max((1 - b) / (1 - a) * (1 - a / b), 0.0))
        direction = np.sqrt(max(1 - b - sigma**2, 0.0))
        weights = np.sqrt(b) * M0 + direction * epsilon(schedule, a)
        rows.append(SamplerStep(t, weights, clean(schedule, a), level(a), sigma))
    return rows[first:], 1.0


def ddpm(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> tuple[list[SamplerStep], float]:
    """arXiv 2006.11239, equation 7, with the variance beta~."""
    rows = []
    levels = [a for _, a, _ in _ends(schedule, schedule.timesteps(num_steps), num_steps, 1.0)]
    for t, a, b in zip(schedule.timesteps(num_steps), levels, [*levels[1:], 1.0], strict=True):
        ratio = a / b
        mean = np.sqrt(b) * (1 - ratio) / (1 - a) * M0 + np.sqrt(ratio) * (1 - b) / (1 - a) * X
        noise = np.sqrt(max((1 - b) / (1 - a) * (1 - ratio), 1e-20)) if t > 0 else 0.0
        rows.append(SamplerStep(t, mean, clean(schedule, a), level(a), noise))
    return rows[first:], 1.0


def pndm(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> tuple[list[SamplerStep], float]:
    """PNDM, arXiv 2202.09778: Runge-Kutta for the first three steps, four calls of the network each, then linear
    multistep. With `skip_prk_steps` (PLMS, Stable Diffusion's) the first step is made twice instead, the second time
    with the mean of both outputs, so that a run has one call more than steps."""
    stride, timesteps = schedule.num_train_timesteps // num_steps, schedule.timesteps(num_steps)
    _ends(schedule, timesteps, num_steps, 1.0)  # all of them exist
    if not schedule.alphas_cumprod[timesteps[0]]:
        raise InputError("scheduler pndm: it cannot start where no signal is left; choose ddim, or another spacing")
    if schedule.skip_prk_steps:
        return _plms(schedule, timesteps[first:], stride), 1.0
    if first or num_steps < 4:
        raise InputError(
            "scheduler pndm: with skip_prk_steps false, which a scheduler_config.json means that does not say it, it "
            "makes at least 4 steps, all of them; set skip_prk_steps to true or choose another scheduler"
        )
    return _runge_kutta(schedule, timesteps, stride), 1.0


def _transfer(schedule: NoiseSchedule, sample: np.ndarray, output: np.ndarray, start: int, end: int) -> np.ndarray:
    """The sample at timestep `end` from that at `start`: equation 9 of the paper."""
    a = schedule.alphas_cumprod.astype(np.float64)
    here, there = a[start], a[end] if end >= 0 else float(schedule.final_alpha_cumprod)
    if schedule.prediction_type == "v_prediction":
        output = np.sqrt(here) * output + np.sqrt(1 - here) * sample
    scale = here * np.sqrt(1 - there) + np.sqrt(here * (1 - here) * there)
    return np.sqrt(there / here) * sample - (there - here) / scale * output


def _multistep(now: np.ndarray, before: Sequence[np.ndarray]) -> np.ndarray:
    """Adams-Bashforth of the outputs of this step and of up to three before, the newest first."""
    past = [now, *before]
    weights = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
    order = weights[min(len(past), 4) - 1]
    return sum((w * output for w, output in zip(order, past, strict=False)), 0 * now)


def _plms(schedule: NoiseSchedule, timesteps: np.ndarray, stride: int) -> list[SamplerStep]:
    begin, *rest = timesteps
    rows = []
    for i, t in enumerate([begin, *rest[:1], *rest]):
        here = level(float(schedule.alphas_cumprod[t]))
        if i == 1:  # again, from the sample before the first step
            weights = _transfer(schedule, KEPT, (M0 + M1) / 2, t + stride, t)
            rows.append(SamplerStep(t, weights, (0.0, 1.0), here))
        else:  # the second call's output is never used again: the first one's lies one place further back
            before = ([], [], [M2], [M1, M3], [M1, M2, M4])[i] if i < 5 else [M1, M2, M3]
            weights = _transfer(schedule, X, _multistep(M0, before), t, t - stride)
            rows.append(SamplerStep(t, weights, (0.0, 1.0), here, kept=X))
    return rows


def _runge_kutta(schedule: NoiseSchedule, timesteps: np.ndarray, stride: int) -> list[SamplerStep]:
    """Three steps of fourth order, whose first outputs, up to 12 calls back, begin the linear multistep."""
    x, kept, _, *m = np.eye(3 + 13)
    half, rows = stride // 2, []

    def call(t: int, weights: np.ndarray, kept: np.ndarray) -> None:
        rows.append(SamplerStep(t, weights, (0.0, 1.0), level(float(schedule.alphas_cumprod[t])), kept=kept))

    for start, end in itertools.pairwise(timesteps[:4]):
        middle = end + half
        call(start, _transfer(schedule, x, m[0], start, start - half), x)
        call(middle, _transfer(schedule, kept, m[0], start, middle), kept)
        call(middle, _transfer(schedule, kept, m[0], start, middle - half), kept)
        call(end, _transfer(schedule, kept, (m[0] + 2 * m[1] + 2 * m[2] + m[3]) / 6, start, end), kept)
    for number, t in enumerate(timesteps[3:]):
        before = [*m[1 : number + 1], *m[number + 4 :: 4]][:3]  # of these steps, then the first ones of those above
        call(t, _transfer(schedule, x, _multistep(m[0], before), t, t - stride), x)
    return rows


_LCM_SIGMA = 0.5  # sigma_data


def lcm(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> tuple[list[SamplerStep], float]:
    """Latent consistency models, arXiv 2310.04378, for networks that were distilled so."""
    most, total = schedule.original_inference_steps, schedule.num_train_timesteps  # steps of its distillation
    if not 1 <= most <= total:
        raise InputError(
            f"scheduler config: original_inference_steps={short_repr(most)} is not usable by lcm, at most {total} can "
            "be, the training timesteps"
        )
    if num_steps > most:
        raise InputError(f"{argument('num_inference_steps', num_steps)}: the scheduler lcm makes at most {most}")
    learnt = np.arange(1, most + 1)[::-1] * (total // most) - 1
    timesteps = learnt[np.floor(np.linspace(0, most, num_steps, endpoint=False)).astype(int)]
    rows = []
    levels = [float(schedule.alphas_cumprod[t]) for t in timesteps]
    for t, a, end in zip(timesteps, levels, [*levels[1:], None], strict=True):
        time = t * schedule.timestep_scaling
        skip = _LCM_SIGMA**2 / (time**2 + _LCM_SIGMA**2)
        denoised = time / np.sqrt(time**2 + _LCM_SIGMA**2) * M0 + skip * X
        if end is None:
            rows.append(SamplerStep(t, denoised, clean(schedule, a), level(a)))
        else:
            rows.append(SamplerStep(t, np.sqrt(end) * denoised, clean(schedule, a), level(a), float(np.sqrt(1 - end))))
    return rows[first:], 1.0
