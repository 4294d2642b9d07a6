"""Samplers in the space of x = sqrt(a) x0 + sqrt(1 - a) epsilon, where a is alphas_cumprod.

Each function computes one sampler's steps (`sampler_table.py`) with the conventions of diffusers. The steps before
`first` are left out.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ipadapter_jax.diffusion.parameterization import Combination, NoiseLevel, to_epsilon, to_x0
from ipadapter_jax.diffusion.sampler_table import (
    AUX_SAMPLE,
    M0,
    M1,
    M2,
    M3,
    M4,
    OUTPUT,
    SamplerStep,
    SamplerSteps,
    X,
)
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.strings import short_repr


class _Interval(NamedTuple):
    """A step of one stride: its timestep, and the alphas_cumprod at its start and its end."""

    timestep: int
    start: float
    end: float


_RAW_OUTPUT = Combination(0.0, 1.0)  # a history of the network's outputs themselves


def _intervals(schedule: NoiseSchedule, timesteps: np.ndarray, num_steps: int, last: float) -> list[_Interval]:
    """The steps of an even stride that begin at these timesteps; `last` is alphas_cumprod beyond timestep 0."""
    a = schedule.alphas_cumprod.astype(np.float64)
    if max(timesteps) >= len(a):
        raise InputError(
            f"scheduler config: steps_offset={schedule.steps_offset} exceeds the {len(a)} training timesteps; use "
            "fewer steps or fix steps_offset in scheduler_config.json"
        )
    ends = timesteps - schedule.num_train_timesteps // num_steps
    return [
        _Interval(t, float(a[t]), float(a[end]) if end >= 0 else last) for t, end in zip(timesteps, ends, strict=True)
    ]


def ddim(schedule: NoiseSchedule, num_steps: int, first: int = 0, eta: float = 0.0) -> SamplerSteps:
    """arXiv 2010.02502, equation 12; eta 0 is deterministic, 1 has the variance of DDPM (equation 16)."""
    steps = []
    timesteps, last = schedule.timesteps(num_steps), float(schedule.final_alpha_cumprod)
    for t, a, b in _intervals(schedule, timesteps, num_steps, last):
        sigma = eta * np.sqrt(max((1 - b) / (1 - a) * (1 - a / b), 0.0))
        direction = np.sqrt(max(1 - b - sigma**2, 0.0))
        level = NoiseLevel.variance_preserving(a)
        of_x, of_output = to_epsilon(schedule.prediction_type, level)
        weights = np.sqrt(b) * M0 + direction * (of_x * X + of_output * OUTPUT)
        steps.append(SamplerStep(t, weights, to_x0(schedule.prediction_type, level), level, sigma))
    return SamplerSteps(steps[first:])


def ddpm(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> SamplerSteps:
    """arXiv 2006.11239, equation 7, with the variance beta~."""
    steps = []
    starts = [interval.start for interval in _intervals(schedule, schedule.timesteps(num_steps), num_steps, 1.0)]
    for t, a, b in zip(schedule.timesteps(num_steps), starts, [*starts[1:], 1.0], strict=True):
        level = NoiseLevel.variance_preserving(a)
        ratio = a / b
        mean = np.sqrt(b) * (1 - ratio) / (1 - a) * M0 + np.sqrt(ratio) * (1 - b) / (1 - a) * X
        noise = np.sqrt(max((1 - b) / (1 - a) * (1 - ratio), 1e-20)) if t > 0 else 0.0
        steps.append(SamplerStep(t, mean, to_x0(schedule.prediction_type, level), level, noise))
    return SamplerSteps(steps[first:])


def pndm(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> SamplerSteps:
    """PNDM, arXiv 2202.09778: Runge-Kutta for the first three steps, four calls of the network each, then linear
    multistep. With `skip_prk_steps` (PLMS, Stable Diffusion's) the first step is made twice instead, the second time
    with the mean of both outputs, so that a run has one call more than steps."""
    stride, timesteps = schedule.num_train_timesteps // num_steps, schedule.timesteps(num_steps)
    _intervals(schedule, timesteps, num_steps, 1.0)  # all of them exist
    if not schedule.alphas_cumprod[timesteps[0]]:
        raise InputError("scheduler pndm: it cannot start where no signal is left; choose ddim, or another spacing")
    if schedule.skip_prk_steps:
        return SamplerSteps(_plms(schedule, timesteps[first:], stride))
    if first or num_steps < 4:
        raise InputError(
            "scheduler pndm: with skip_prk_steps false, which a scheduler_config.json means that does not say it, it "
            "makes at least 4 steps, all of them; set skip_prk_steps to true or choose another scheduler"
        )
    return SamplerSteps(_runge_kutta(schedule, timesteps, stride))


def _transfer(schedule: NoiseSchedule, sample: np.ndarray, output: np.ndarray, start: int, end: int) -> np.ndarray:
    """The sample at timestep `end` from that at `start`: equation 9 of the paper."""
    a = schedule.alphas_cumprod.astype(np.float64)
    here, there = a[start], a[end] if end >= 0 else float(schedule.final_alpha_cumprod)
    of_x, of_output = to_epsilon(schedule.prediction_type, NoiseLevel.variance_preserving(here))
    epsilon = of_output * output + of_x * sample
    scale = here * np.sqrt(1 - there) + np.sqrt(here * (1 - here) * there)
    return np.sqrt(there / here) * sample - (there - here) / scale * epsilon


def _multistep(now: np.ndarray, before: Sequence[np.ndarray]) -> np.ndarray:
    """Adams-Bashforth of the outputs of this step and of up to three before, the newest first."""
    past = [now, *before]
    weights = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
    order = weights[min(len(past), 4) - 1]
    return sum((w * output for w, output in zip(order, past, strict=False)), 0 * now)


def _plms(schedule: NoiseSchedule, timesteps: np.ndarray, stride: int) -> list[SamplerStep]:
    begin, *rest = timesteps
    steps = []
    for i, t in enumerate([begin, *rest[:1], *rest]):
        level = NoiseLevel.variance_preserving(float(schedule.alphas_cumprod[t]))
        if i == 1:  # again, from the sample before the first step
            weights = _transfer(schedule, AUX_SAMPLE, (M0 + M1) / 2, t + stride, t)
            steps.append(SamplerStep(t, weights, _RAW_OUTPUT, level))
        else:  # the second call's output is never used again: the first one's lies one place further back
            before = ([], [], [M2], [M1, M3], [M1, M2, M4])[i] if i < 5 else [M1, M2, M3]
            weights = _transfer(schedule, X, _multistep(M0, before), t, t - stride)
            steps.append(SamplerStep(t, weights, _RAW_OUTPUT, level, aux_sample=X))
    return steps


def _runge_kutta(schedule: NoiseSchedule, timesteps: np.ndarray, stride: int) -> list[SamplerStep]:
    """Three steps of fourth order, whose first outputs, up to 12 calls back, begin the linear multistep."""
    x, aux_sample, _, *m = np.eye(3 + 13)
    half = stride // 2
    steps = []

    def call(t: int, weights: np.ndarray, next_aux_sample: np.ndarray) -> None:
        level = NoiseLevel.variance_preserving(float(schedule.alphas_cumprod[t]))
        steps.append(SamplerStep(t, weights, _RAW_OUTPUT, level, aux_sample=next_aux_sample))

    for start, end in itertools.pairwise(timesteps[:4]):
        middle = end + half
        call(start, _transfer(schedule, x, m[0], start, start - half), x)
        call(middle, _transfer(schedule, aux_sample, m[0], start, middle), aux_sample)
        call(middle, _transfer(schedule, aux_sample, m[0], start, middle - half), aux_sample)
        call(end, _transfer(schedule, aux_sample, (m[0] + 2 * m[1] + 2 * m[2] + m[3]) / 6, start, end), aux_sample)
    for number, t in enumerate(timesteps[3:]):
        before = [*m[1 : number + 1], *m[number + 4 :: 4]][:3]  # of these steps, then the first ones of those above
        call(t, _transfer(schedule, x, _multistep(m[0], before), t, t - stride), x)
    return steps


_LCM_SIGMA = 0.5  # sigma_data


def lcm(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> SamplerSteps:
    """Latent consistency models, arXiv 2310.04378, for networks that were distilled so."""
    most, total = schedule.original_inference_steps, schedule.num_train_timesteps  # steps of its distillation
    if not 1 <= most <= total:
        raise InputError(
            f"scheduler config: original_inference_steps={short_repr(most)} is not usable by lcm, at most {total} can "
            "be, the training timesteps"
        )
    if num_steps > most:
        raise InputError(f"{argument('num_inference_steps', num_steps)}: the scheduler lcm makes at most {most}")
    distilled = np.arange(1, most + 1)[::-1] * (total // most) - 1
    timesteps = distilled[np.floor(np.linspace(0, most, num_steps, endpoint=False)).astype(int)]
    steps = []
    starts = [float(schedule.alphas_cumprod[t]) for t in timesteps]
    for t, a, end in zip(timesteps, starts, [*starts[1:], None], strict=True):
        time = t * schedule.timestep_scaling
        skip = _LCM_SIGMA**2 / (time**2 + _LCM_SIGMA**2)
        denoised = time / np.sqrt(time**2 + _LCM_SIGMA**2) * M0 + skip * X
        level = NoiseLevel.variance_preserving(a)
        x0 = to_x0(schedule.prediction_type, level)
        if end is None:
            steps.append(SamplerStep(t, denoised, x0, level))
        else:
            steps.append(SamplerStep(t, np.sqrt(end) * denoised, x0, level, np.sqrt(1 - end)))
    return SamplerSteps(steps[first:])
