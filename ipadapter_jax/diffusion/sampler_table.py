"""Every sampler as a table of numbers, and the one step that they share.

All of them are linear: the next sample is a weighted sum of the sample, of one sample kept from before, of the
network's output, of what is remembered of it and of the outputs before, and of fresh noise. So a sampler is a function
that makes the weights (in float64, in its paper's symbols: `samplers.py`), and a run of any sampler is the same program
over other numbers.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

HISTORY = 5  # outputs that most samplers remember, this step's among them
BASIS = ("x", "kept", "output", *(f"m{k}" for k in range(HISTORY)))  # m0 is this step's, m1 the step's before


class SamplerTable(NamedTuple):
    """What each step needs, every field (num_steps, ...): a scan walks the leading axis."""

    timestep: np.ndarray | Array  # float32, given to the network
    input_scale: np.ndarray | Array  # of x as the network sees it
    memory: np.ndarray | Array  # (2,): m0 = memory[0] x + memory[1] output, then clipped
    clip: np.ndarray | Array  # the largest |m0|; infinity does not clip
    weights: np.ndarray | Array  # (2, len(BASIS)), or longer for who looks further back: x and kept at the next step
    noise: np.ndarray | Array  # standard deviation of the fresh noise in x
    level: np.ndarray | Array  # (2,): x after the step is level[0] of the image and level[1] of standard noise


X, KEPT, OUTPUT, M0, M1, M2, M3, M4 = np.eye(len(BASIS))  # a weighted sum of the basis, as a row of weights


class SamplerStep(NamedTuple):
    """One step as a sampler makes it; fields as those of `SamplerTable`, `weights` and `kept` as rows of weights."""

    timestep: float
    weights: np.ndarray
    memory: tuple[float, float]
    level: tuple[float, float]  # here of x before the step
    noise: float = 0.0
    kept: np.ndarray = 0 * X
    input_scale: float = 1.0


class State(NamedTuple):
    """What a run carries from step to step, all like x (..., C) but `memory` (HISTORY - 1 or more, ..., C)."""

    x: Array
    kept: Array
    memory: Array


def init_state(x: Array, length: int = len(BASIS)) -> State:
    """The state before the first step, for a table whose rows of weights have this length."""
    return State(x, jnp.zeros_like(x), jnp.zeros((length - 4, *x.shape), x.dtype))


def sampler_step(step: SamplerTable, state: State, output: Array, noise: Array | None = None) -> State:
    """One step, whose fields hold scalars: the network's output at `step.input_scale * state.x` -> the next state.

    noise is standard normal of x's shape, and needed where `step.noise` is not 0.
    """
    m = jnp.clip(step.memory[0] * state.x + step.memory[1] * output, -step.clip, step.clip)
    memory = jnp.concatenate([m[None], state.memory])
    basis = jnp.concatenate([jnp.stack([state.x, state.kept, output]), memory])
    weights = jnp.reshape(step.weights, (2, len(basis), *(1,) * state.x.ndim))
    x, kept = (weights * basis).sum(axis=1)
    return State(x if noise is None else x + step.noise * noise, kept, memory[:-1])
