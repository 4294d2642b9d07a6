"""Samplers whose steps follow sigma, the noise relative to the signal: sigma = sqrt((1 - a) / a), where a is
alphas_cumprod.

Each function computes one sampler's steps (`sampler_table.py`) with the conventions of diffusers. The steps before
`first` are left out.
"""

from typing import NamedTuple

import numpy as np

from ipadapter_jax.diffusion.parameterization import NoiseLevel, to_x0
from ipadapter_jax.diffusion.sampler_table import AUX_SAMPLE, M0, M1, M2, SamplerStep, SamplerSteps, X
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError, argument


def _sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """Of every training timestep. Without any signal sigma would be infinite: diffusers' bound."""
    a = schedule.alphas_cumprod.astype(np.float64)
    if schedule.rescale_betas_zero_snr:
        a[-1] = 2.0**-24
    return np.sqrt((1 - a) / a)


def _karras(schedule: NoiseSchedule, low: float, high: float, count: int) -> np.ndarray:
    """arXiv 2206.00364, equation 5, rho = 7; between these levels unless the schedule names others."""
    low, high, ramp = schedule.sigma_min or low, schedule.sigma_max or high, np.linspace(0, 1, count)
    return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def _times(sigmas: np.ndarray, of_timesteps: np.ndarray) -> np.ndarray:
    """The timesteps of these sigmas, between the whole ones, linear in log sigma."""
    return np.interp(np.log(sigmas), np.log(of_timesteps), np.arange(len(of_timesteps)))


class _Sigmas(NamedTuple):
    """The noise levels of a run."""

    timesteps: np.ndarray  # (n,)
    sigmas: np.ndarray  # (n + 1,), down to the last one
    init_noise_sigma: float = 1.0


def _euler_sigmas(schedule: NoiseSchedule, num_steps: int) -> _Sigmas:
    spacing, known = schedule.timestep_spacing, _sigmas(schedule)
    timesteps = schedule.timesteps(num_steps).astype(np.float64)
    if spacing == "linspace":  # between the whole ones
        timesteps = np.linspace(0, schedule.num_train_timesteps - 1, num_steps)[::-1]
    sigmas = np.interp(timesteps, np.arange(len(known)), known)
    if schedule.use_karras_sigmas:
        sigmas = _karras(schedule, sigmas[-1], sigmas[0], num_steps)
        timesteps = _times(sigmas, known)
    if schedule.timestep_type == "continuous" and schedule.prediction_type == "v_prediction":
        timesteps = 0.25 * np.log(sigmas)
    init = sigmas.max() if spacing != "leading" else np.sqrt(sigmas.max() ** 2 + 1)
    last = known[0] if schedule.final_sigmas_type == "sigma_min" else 0.0
    return _Sigmas(timesteps, np.append(sigmas, last), float(init))


def _sigma_step(
    schedule: NoiseSchedule, timestep: float, weights: np.ndarray, sigma: float, noise: float = 0.0
) -> SamplerStep:
    level = NoiseLevel.variance_exploding(sigma)
    x0 = to_x0(schedule.prediction_type, level)
    return SamplerStep(timestep, weights, x0, level, noise, input_scale=1 / level.norm)


def euler(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> SamplerSteps:
    """The first-order step along dx / dsigma = (x - x0) / sigma (arXiv 2206.00364, algorithm 2 without churn)."""
    timesteps, sigmas, init = _euler_sigmas(schedule, num_steps)
    steps = []
    for t, sigma, end in zip(timesteps, sigmas, sigmas[1:], strict=False):
        weights = end / sigma * X + (1 - end / sigma) * M0
        steps.append(_sigma_step(schedule, t, weights, sigma))
    return SamplerSteps(steps[first:], init)


def euler_ancestral(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> SamplerSteps:
    """The same down to a smaller sigma, and noise up again."""
    timesteps, sigmas, init = _euler_sigmas(schedule, num_steps)
    steps = []
    for t, sigma, end in zip(timesteps, sigmas, sigmas[1:], strict=False):
        up = np.sqrt(end**2 * (sigma**2 - end**2) / sigma**2)
        down = np.sqrt(end**2 - up**2)
        weights = down / sigma * X + (1 - down / sigma) * M0
        steps.append(_sigma_step(schedule, t, weights, sigma, noise=up))
    return SamplerSteps(steps[first:], init)


def _multistep_sigmas(schedule: NoiseSchedule, num_steps: int) -> _Sigmas:
    """Those of the multistep solvers, which end before timestep 0."""
    known, spacing = _sigmas(schedule), schedule.timestep_spacing
    total = len(known) if schedule.lambda_min_clipped is None else _clipped(known, schedule.lambda_min_clipped)
    timesteps = schedule.timesteps(num_steps)
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, num_steps + 1).round()[::-1][:-1].astype(int)
    elif spacing == "leading":
        timesteps = (np.arange(num_steps + 1) * (total // (num_steps + 1)))[::-1][:-1] + schedule.steps_offset
    elif total < len(known):
        raise InputError("scheduler config: lambda_min_clipped is not supported with timestep_spacing trailing")
    last = known[0] if schedule.final_sigmas_type == "sigma_min" else 0.0
    if schedule.use_karras_sigmas:
        sigmas = _karras(schedule, known[0], known[-1], num_steps)
        return _Sigmas(_times(sigmas, known), np.append(sigmas, last))
    if len(set(timesteps.tolist())) < num_steps:
        raise InputError(
            f"{argument('num_inference_steps', num_steps)}: multistep solvers need fewer than {total}; 20 to 30 do"
        )
    return _Sigmas(timesteps, np.append(np.interp(timesteps, np.arange(len(known)), known), last))


def _clipped(known: np.ndarray, lowest: float) -> int:
    """The training timesteps whose lambda = -log sigma is not below `lowest`."""
    return len(known) - int(np.searchsorted(-np.log(known[::-1]), lowest))


class _Point(NamedTuple):
    """A noise level of a multistep solver: x = alpha x0 + sigma epsilon, lambda = log(alpha / sigma)."""

    alpha: float
    sigma: float
    lam: float

    @classmethod
    def of(cls, sigma: float) -> "_Point":
        alpha = 1 / np.sqrt(sigma**2 + 1)
        return cls(alpha, sigma * alpha, np.inf if sigma == 0 else -np.log(sigma))


def dpm_solver_pp_2m(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> SamplerSteps:
    """DPM-Solver++ (2M), arXiv 2211.01095, algorithm 2: second order, the first and last steps first order."""
    timesteps, sigmas, _ = _multistep_sigmas(schedule, num_steps)
    if schedule.use_karras_sigmas:  # onto whole ones, and for this noise schedule down to them
        timesteps = np.floor(timesteps) if schedule.beta_schedule == "squaredcos_cap_v2" else timesteps.round()
    points = [_Point.of(sigma) for sigma in sigmas]
    steps = []
    for i in range(first, num_steps):
        s, e = points[i], points[i + 1]
        h = e.lam - s.lam
        few = schedule.lower_order_final and num_steps < 15
        final = i == num_steps - 1 and (few or schedule.euler_at_final or sigmas[-1] == 0)
        weights = e.sigma / s.sigma * X - e.alpha * np.expm1(-h) * M0
        if schedule.solver_order > 1 and i > first and not final:
            r = (s.lam - points[i - 1].lam) / h
            weights = weights - 0.5 * e.alpha * np.expm1(-h) * (M0 - M1) / r
        level = NoiseLevel(s.alpha, s.sigma)
        steps.append(SamplerStep(timesteps[i], weights, to_x0(schedule.prediction_type, level), level))
    return SamplerSteps(steps)


def unipc(schedule: NoiseSchedule, num_steps: int, first: int = 0) -> SamplerSteps:
    """UniPC of order 2, arXiv 2302.04867, in the data prediction: at each step the new output first corrects the sample
    (UniC), from which the next one is predicted (UniP)."""
    timesteps, sigmas, _ = _multistep_sigmas(schedule, num_steps)
    if schedule.use_karras_sigmas:  # here, unlike in DPM-Solver, on whole ones, and down to their own last one
        timesteps = timesteps.round()
        sigmas[-1] = sigmas[-2] if schedule.final_sigmas_type == "sigma_min" else 0.0
    if not schedule.lower_order_final and min(schedule.solver_order, num_steps - first) > 1 and sigmas[-1] == 0:
        raise InputError(
            "scheduler config: lower_order_final=False is not supported by unipc down to no noise at all, there is no "
            "finite step of second order; set final_sigmas_type to sigma_min"
        )
    points = [_Point.of(sigma) for sigma in sigmas]
    steps, before = [], 0
    for i in range(first, num_steps):
        corrects = i > first and i - 1 not in schedule.disable_corrector
        sample = _correct(schedule, points[: i + 1], before) if corrects else X
        order = min(schedule.solver_order, i - first + 1)
        if schedule.lower_order_final:
            order = min(order, num_steps - i)
        s, e = points[i], points[i + 1]
        h = e.lam - s.lam
        weights = e.sigma / s.sigma * sample - e.alpha * np.expm1(-h) * M0
        if order == 2:
            r = (points[i - 1].lam - s.lam) / h
            weights = weights - e.alpha * _b(schedule, h) * 0.5 * (M1 - M0) / r
        level = NoiseLevel(s.alpha, s.sigma)
        x0 = to_x0(schedule.prediction_type, level)
        steps.append(SamplerStep(timesteps[i], weights, x0, level, aux_sample=sample))
        before = order
    return SamplerSteps(steps)


def _correct(schedule: NoiseSchedule, points: list[_Point], order: int) -> np.ndarray:
    """UniC: the sample at the last point, from the auxiliary sample at the point before it and the output there."""
    s, e = points[-2], points[-1]
    h = e.lam - s.lam
    phi = [np.expm1(-h) / -h - 1]  # of order 1, then 2
    phi.append(phi[0] / -h - 0.5)
    step = e.sigma / s.sigma * AUX_SAMPLE - e.alpha * np.expm1(-h) * M1
    if order == 1:
        return step - e.alpha * _b(schedule, h) * 0.5 * (M0 - M1)
    r = (points[-3].lam - s.lam) / h
    rho = np.linalg.solve([[1.0, 1.0], [r, 1.0]], np.array([phi[0], 2 * phi[1]]) / _b(schedule, h))
    return step - e.alpha * _b(schedule, h) * (rho[0] * (M2 - M1) / r + rho[1] * (M0 - M1))


def _b(schedule: NoiseSchedule, h: float) -> float:
    """B(h) of the paper, for the prediction of x0: its variants bh1 and bh2."""
    return -h if schedule.solver_type == "bh1" else np.expm1(-h)
