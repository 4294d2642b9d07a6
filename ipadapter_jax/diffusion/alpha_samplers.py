"""Samplers in the space of x = sqrt(a) x0 + sqrt(1 - a) epsilon, a being alphas_cumprod: each is the function that
makes its table of weights (`steps.py`), with diffusers' conventions."""

import numpy as np

from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.diffusion.steps import KEPT, M0, M1, M2, M3, M4, OUTPUT, Row, X
from ipadapter_jax.errors import InputError, argument


def clean(schedule: NoiseSchedule, a: float) -> tuple[float, float]:
    """x0 = this[0] x + this[1] output. For v-prediction see arXiv 2202.00512, appendix D."""
    with np.errstate(divide="ignore"):
        return {
            "epsilon": (1 / np.sqrt(a), -np.sqrt(1 - a) / np.sqrt(a)),
            "v_prediction": (np.sqrt(a), -np.sqrt(1 - a)),
            "sample": (0.0, 1.0),
        }[schedule.prediction_type]


def level(a: float) -> tuple[float, float]:
    """Picture and noise in x."""
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


def ddim(schedule: NoiseSchedule, num_steps: int, first: int = 0, eta: float = 0.0) -> tuple[list[Row], float]:
    """arXiv 2010.02502, equation 12; eta 0 is deterministic, 1 has the variance of DDPM (equation 16)."""
    rows = []
    timesteps, last = schedule.timesteps(num_steps), float(schedule.final_alpha_cumprod)
    for t, a, b in _ends(schedule, timesteps, num_steps, last):
        sigma = eta * np.sqrt(max((1 - b) / (1 - a) * (1 - a / b), 0.0))
        direction = np.sqrt(max(1 - b - sigma**2, 0.0))
        weights = np.sqrt(b) * M0 + direction * epsilon(schedule, a)
        rows.append(Row(t, weights, clean(schedule, a), level(a), sigma))
    return rows[first:], 1.0


def ddpm(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> tuple[list[Row], float]:
    """arXiv 2006.11239, equation 7, with the variance beta~."""
    rows = []
    levels = [a for _, a, _ in _ends(schedule, schedule.timesteps(num_steps), num_steps, 1.0)]
    for t, a, b in zip(schedule.timesteps(num_steps), levels, [*levels[1:], 1.0], strict=True):
        ratio = a / b
        mean = np.sqrt(b) * (1 - ratio) / (1 - a) * M0 + np.sqrt(ratio) * (1 - b) / (1 - a) * X
        noise = np.sqrt(max((1 - b) / (1 - a) * (1 - ratio), 1e-20)) if t > 0 else 0.0
        rows.append(Row(t, mean, clean(schedule, a), level(a), noise))
    return rows[first:], 1.0


def pndm(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> tuple[list[Row], float]:
    """PLMS, arXiv 2202.09778 without the Runge-Kutta start: the first step is made twice, the second time with the mean
    of both outputs, so that a run has one call more than steps. Equation 9 is `transfer`."""
    if schedule.prediction_type == "sample":
        raise InputError("scheduler pndm: it knows prediction_type epsilon and v_prediction, not sample")
    a = schedule.alphas_cumprod.astype(np.float64)
    last = 1.0 if schedule.set_alpha_to_one else a[0]  # where a config does not say, the other way round than DDIM
    stride, timesteps = schedule.num_train_timesteps // num_steps, schedule.timesteps(num_steps)
    _ends(schedule, timesteps, num_steps, last)  # all of them exist
    if not a[timesteps[0]]:
        raise InputError("scheduler pndm: it cannot start where no signal is left; choose ddim, or another spacing")

    def transfer(sample: np.ndarray, output: np.ndarray, start: int, end: int) -> np.ndarray:
        here, there = a[start], a[end] if end >= 0 else last
        if schedule.prediction_type == "v_prediction":
            output = np.sqrt(here) * output + np.sqrt(1 - here) * sample
        scale = here * np.sqrt(1 - there) + np.sqrt(here * (1 - here) * there)
        return np.sqrt(there / here) * sample - (there - here) / scale * output

    # Adams-Bashforth. The second call's output is never used again: the first one's lies one place further back.
    orders = [M0, (M0 + M1) / 2, (3 * M0 - M2) / 2, (23 * M0 - 16 * M1 + 5 * M3) / 12]
    orders += [(55 * M0 - 59 * M1 + 37 * M2 - 9 * M4) / 24]
    begin, *rest = timesteps[first:]
    calls = [begin, *rest[:1], *rest]
    rows = []
    for i, t in enumerate(calls):
        output = orders[i] if i < len(orders) else (55 * M0 - 59 * M1 + 37 * M2 - 9 * M3) / 24
        if i == 1:  # from the sample before the first step
            rows.append(Row(t, transfer(KEPT, output, t + stride, t), (0.0, 1.0), level(float(a[t]))))
        else:
            rows.append(Row(t, transfer(X, output, t, t - stride), (0.0, 1.0), level(float(a[t])), kept=X))
    return rows, 1.0


_LCM_STEPS, _LCM_TIME, _LCM_SIGMA = 50, 10.0, 0.5  # steps of its distillation, scale of time, sigma_data


def lcm(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> tuple[list[Row], float]:
    """Latent consistency models, arXiv 2310.04378, for networks that were distilled so."""
    if num_steps > _LCM_STEPS:
        raise InputError(f"{argument('num_inference_steps', num_steps)}: the scheduler lcm makes at most {_LCM_STEPS}")
    if schedule.num_train_timesteps < _LCM_STEPS:
        raise InputError(f"scheduler lcm: it needs {_LCM_STEPS} training timesteps; choose another")
    learnt = np.arange(1, _LCM_STEPS + 1)[::-1] * (schedule.num_train_timesteps // _LCM_STEPS) - 1
    timesteps = learnt[np.floor(np.linspace(0, _LCM_STEPS, num_steps, endpoint=False)).astype(int)]
    rows = []
    levels = [float(schedule.alphas_cumprod[t]) for t in timesteps]
    for t, a, end in zip(timesteps, levels, [*levels[1:], None], strict=True):
        time = t * _LCM_TIME
        skip = _LCM_SIGMA**2 / (time**2 + _LCM_SIGMA**2)
        denoised = time / np.sqrt(time**2 + _LCM_SIGMA**2) * M0 + skip * X
        if end is None:
            rows.append(Row(t, denoised, clean(schedule, a), level(a)))
        else:
            rows.append(Row(t, np.sqrt(end) * denoised, clean(schedule, a), level(a), float(np.sqrt(1 - end))))
    return rows[first:], 1.0
