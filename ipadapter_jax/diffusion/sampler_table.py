"""Every sampler as a table of numbers, and the one step that they share.

All samplers are linear. The next sample is a weighted sum of the sample x, one auxiliary sample, the network's output,
a history of predictions (such as x0) from this and earlier outputs, and fresh noise. So a sampler is a function that
computes these weights with numpy in float64 (`samplers_alpha.py`, `samplers_sigma.py`), and one jitted program runs all
samplers.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ipadapter_jax.diffusion.parameterization import Combination, NoiseLevel

# The number of predictions that a step combines: m0 is that of this step, m1 that of the step before. Only PNDM with
# Runge-Kutta steps has a longer history.
HISTORY = 5
BASIS = ("x", "aux_sample", "output", *(f"m{k}" for k in range(HISTORY)))
X, AUX_SAMPLE, OUTPUT, M0, M1, M2, M3, M4 = np.eye(len(BASIS))  # unit vectors: weights are sums of them


class SamplerTable(NamedTuple):
    """The numbers of all steps. Every field is (num_steps, ...), and a scan iterates over the leading axis."""

    timestep: np.ndarray | Array  # float32, given to the network
    input_scale: np.ndarray | Array  # the network is given input_scale * x
    prediction: np.ndarray | Array  # (2,): m0 = prediction[0] x + prediction[1] output, then clipped
    clip: np.ndarray | Array  # the largest |m0|; infinity does not clip
    weights: np.ndarray | Array  # (2, len(BASIS) or more): weights of the next x and of the next aux_sample
    noise: np.ndarray | Array  # standard deviation of the fresh noise in x
    alpha: np.ndarray | Array  # weight of the clean image in x after the step
    sigma: np.ndarray | Array  # weight of standard normal noise in x after the step


class SamplerStep(NamedTuple):
    """One step of a sampler in float64. The fields are as in `SamplerTable`, except: `weights` gives the next x and
    `aux_sample` the next auxiliary sample, both as weights over BASIS."""

    timestep: float
    weights: np.ndarray
    prediction: Combination
    level: NoiseLevel  # of x before the step
    noise: float = 0.0
    aux_sample: np.ndarray = 0 * X
    input_scale: float = 1.0


class SamplerSteps(NamedTuple):
    """The steps of a run, and the standard deviation of pure noise before the first one."""

    steps: list[SamplerStep]
    init_noise_sigma: float = 1.0


class State(NamedTuple):
    """The carry of the scan over steps: x and aux_sample (..., C), history (HISTORY - 1 or more, ..., C)."""

    x: Array
    aux_sample: Array
    history: Array


def init_state(x: Array, length: int = len(BASIS)) -> State:
    """The state before the first step, for a table whose weights have this length."""
    return State(x, jnp.zeros_like(x), jnp.zeros((length - 4, *x.shape), x.dtype))


def sampler_step(step: SamplerTable, state: State, output: Array, noise: Array | None = None) -> State:
    """One step: the state and the network's output for `step.input_scale * state.x` -> the next state.

    step: one row of the table. noise: standard normal, in the shape of x; required if `step.noise` is not 0.
    """
    m = jnp.clip(step.prediction[0] * state.x + step.prediction[1] * output, -step.clip, step.clip)
    history = jnp.concatenate([m[None], state.history])
    basis = jnp.concatenate([jnp.stack([state.x, state.aux_sample, output]), history])
    weights = jnp.reshape(step.weights, (2, len(basis), *(1,) * state.x.ndim))
    x, aux_sample = (weights * basis).sum(axis=1)
    return State(x if noise is None else x + step.noise * noise, aux_sample, history[:-1])
