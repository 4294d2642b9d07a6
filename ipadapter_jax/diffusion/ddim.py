"""DDIM (arXiv 2010.02502) as one function per step and one table of coefficients per run."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError


class DDIMSteps(NamedTuple):
    """What each step needs, every field (num_steps,): a scan walks the leading axis."""

    timestep: np.ndarray | Array  # int32, given to the network
    alpha: np.ndarray | Array  # alphas_cumprod here
    alpha_next: np.ndarray | Array  # alphas_cumprod where the step ends
    sigma: np.ndarray | Array  # standard deviation of the fresh noise


def ddim_steps(schedule: NoiseSchedule, num_steps: int, eta: float = 0.0) -> DDIMSteps:
    """The run's table. eta 0 is deterministic, 1 has the variance of DDPM (equation 16)."""
    timesteps, alphas = schedule.timesteps(num_steps), schedule.alphas_cumprod
    ends = timesteps - schedule.num_train_timesteps // num_steps
    if timesteps[0] >= len(alphas):
        raise InputError(
            f"scheduler config: steps_offset={schedule.steps_offset} exceeds the {len(alphas)} training timesteps; "
            "use fewer steps or mend it"
        )
    alpha = alphas[timesteps].astype(np.float64)
    alpha_next = np.where(ends >= 0, alphas[np.maximum(ends, 0)], schedule.final_alpha_cumprod).astype(np.float64)
    variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
    sigma = eta * np.sqrt(np.maximum(variance, 0.0))
    return DDIMSteps(timesteps, *(x.astype(np.float32) for x in (alpha, alpha_next, sigma)))


def ddim_step(schedule: NoiseSchedule, step: DDIMSteps, x: Array, output: Array, noise: Array | None = None) -> Array:
    """One step of equation 12: x (..., C) and the network's output at `step` -> x at the next timestep, float32.

    `step` holds scalars. noise is standard normal of x's shape, and needed where sigma is not 0.
    """
    x0, epsilon = to_x0_and_epsilon(schedule.prediction_type, x, output, step.alpha)
    if schedule.clip_sample:
        x0 = jnp.clip(x0, -schedule.clip_sample_range, schedule.clip_sample_range)
    direction = jnp.sqrt(1 - step.alpha_next - step.sigma**2) * epsilon
    x = jnp.sqrt(step.alpha_next) * x0 + direction
    return x if noise is None else x + step.sigma * noise


def to_x0_and_epsilon(prediction_type: str, x: Array, output: Array, alpha: Array | np.ndarray) -> tuple[Array, Array]:
    """The clean sample and the noise that the network's output means: x = sqrt(alpha) x0 + sqrt(1 - alpha) epsilon.

    For v-prediction see arXiv 2202.00512, appendix D.
    """
    signal, noise = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    if prediction_type == "epsilon":
        return (x - noise * output) / signal, output
    if prediction_type == "v_prediction":
        return signal * x - noise * output, signal * output + noise * x
    return output, (x - signal * output) / noise
