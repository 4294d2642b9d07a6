"""Every sampler as a table of numbers, and the one step that they share.

All samplers are linear: the next sample is a weighted sum of the sample, of one auxiliary sample carried along, of the
network's output, of a history of what this and earlier outputs predict, and of fresh noise. So a sampler is a function
that computes the weights (in float64, in its paper's symbols: `samplers_alpha.py`, `samplers_sigma.py`), and every
sampler runs as the same program over other numbers.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ipadapter_jax.diffusion.parameterization import Combination, NoiseLevel

HISTORY = 5  # predictions that most samplers combine, this step's among them
BASIS = ("x", "aux_sample", "output", *(f"m{k}" for k in range(HISTORY)))  # m0 is of this step, m1 of the one before
X, AUX_SAMPLE, OUTPUT, M0, M1, M2, M3, M4 = np.eye(len(BASIS))  # each as weights over the basis


class SamplerTable(NamedTuple):
    """What each step needs, every field (num_steps, ...): a scan iterates over the leading axis."""

    timestep: np.ndarray | Array  # float32, given to the network
    input_scale: np.ndarray | Array  # of x as the network sees it
    prediction: np.ndarray | Array  # (2,): m0 = prediction[0] x + prediction[1] output, then clipped
    clip: np.ndarray | Array  # the largest |m0|; infinity does not clip
    weights: np.ndarray | Array  # (2, len(BASIS) or more for a longer history): of the next x and the next aux_sample
    noise: np.ndarray | Array  # standard deviation of the fresh noise in x
    alpha: np.ndarray | Array  # weight of the clean image in x after the step
    sigma: np.ndarray | Array  # weight of standard normal noise in x after the step


class SamplerStep(NamedTuple):
    """One step of a sampler in float64; fields as in `SamplerTable`, `weights` and `aux_sample` over the basis."""

    timestep: float
    weights: np.ndarray
    prediction: Combination
    level: NoiseLevel  # of x before the step
    noise: float = 0.0
    aux_sample: np.ndarray = 0 * X
    input_scale: float = 1.0


class SamplerSteps(NamedTuple):
    """The steps of a run, and the factor of standard normal latents before the first one."""

    steps: list[SamplerStep]
    init_noise_sigma: float = 1.0


class State(NamedTuple):
    """What a run carries from step to step: x and aux_sample (..., C), history (HISTORY - 1 or more, ..., C)."""

    x: Array
    aux_sample: Array
    history: Array


def init_state(x: Array, length: int = len(BASIS)) -> State:
    """The state before the first step, for a table whose weights have this length."""
    return State(x, jnp.zeros_like(x), jnp.zeros((length - 4, *x.shape), x.dtype))


def sampler_step(step: SamplerTable, state: State, output: Array, noise: Array | None = None) -> State:
    """One step, whose fields hold scalars: the network's output at `step.input_scale * state.x` -> the next state.

    noise is standard normal of x's shape, and needed where `step.noise` is not 0.
    """
    m = jnp.clip(step.prediction[0] * state.x + step.prediction[1] * output, -step.clip, step.clip)
    history = jnp.concatenate([m[None], state.history])
    basis = jnp.concatenate([jnp.stack([state.x, state.aux_sample, output]), history])
    weights = jnp.reshape(step.weights, (2, len(basis), *(1,) * state.x.ndim))
    x, aux_sample = (weights * basis).sum(axis=1)
    return State(x if noise is None else x + step.noise * noise, aux_sample, history[:-1])
