"""The denoising loop: all steps of a sampler as one scan, sharded by sample over the devices."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ipadapter_jax.diffusion.parameterization import add_noise
from ipadapter_jax.diffusion.sampler_table import SamplerTable, State, init_state, sampler_step
from ipadapter_jax.pipelines.conditioning import BY_SAMPLE, REPLICATED, Conditioning, PreservedRegion
from ipadapter_jax.pipelines.denoiser import Denoiser
from ipadapter_jax.pipelines.sample_batch import SampleBatch
from ipadapter_jax.runtime.trees import Params

AttentionMaps = list[list[Any]] | None
"""Per image branch and cross-attention layer (n, B, L, N), for n steps."""

OnStep = Callable[[int, float, Array], None]
"""Called after every step with its number, its timestep and the latents (B, h, w, C)."""


class Steps(NamedTuple):
    """What the sampler takes for each of n steps."""

    table: SamplerTable  # (n, ...)
    noise: Array | None  # (n, B, h, w, C), for samplers that add noise


_BY_STEP_AND_SAMPLE: Any = P(None, "data")
_BY_SAMPLE: Any = BY_SAMPLE
_REPLICATED: Any = REPLICATED
STATE = State(x=_BY_SAMPLE, aux_sample=_BY_SAMPLE, history=_BY_STEP_AND_SAMPLE)  # how each field is sharded
STEPS = Steps(table=_REPLICATED, noise=_BY_STEP_AND_SAMPLE)


def denoise(
    denoiser: Denoiser,
    mesh: Mesh,
    params: Mapping[str, Params],
    state: State,
    steps: Steps,
    conditioning: Conditioning,
) -> tuple[State, AttentionMaps]:
    """The sampler's state of B samples after the given steps, and the attention maps of each step where the denoiser
    gives them. Denoiser and mesh are static."""

    def scan(
        params: Mapping[str, Params], state: State, steps: Steps, conditioning: Conditioning
    ) -> tuple[State, AttentionMaps]:
        known = denoiser.steps(params, jnp.asarray(steps.table.timestep))  # of all steps, before the loop

        def body(state: State, of_step: Any) -> tuple[State, AttentionMaps]:
            (table, noise), known, by_step = of_step
            x = table.input_scale * state.x
            denoised = denoiser(params, x, known, conditioning.with_steps(by_step))
            state = sampler_step(table, state, denoised.output, noise)
            if conditioning.preserved is not None:
                state = state._replace(x=_with_preserved(state.x, conditioning.preserved, table))
            return state, denoised.maps

        return jax.lax.scan(body, state, (steps, known, conditioning.by_step()))

    specs = (REPLICATED, STATE, STEPS, conditioning.specs())
    sharded = jax.shard_map(scan, mesh=mesh, in_specs=specs, out_specs=(STATE, _BY_STEP_AND_SAMPLE), check_vma=False)
    return sharded(params, state, steps, conditioning)


def _with_preserved(x: Array, preserved: PreservedRegion, table: Any) -> Array:
    """The original latents, as noisy as the samples (B, h, w, C) are, outside of the mask."""
    original = add_noise(table.alpha, table.sigma, preserved.latents, preserved.noise)
    return preserved.mask * x + (1 - preserved.mask) * original


def initial_state(latents: Array, table: SamplerTable, mesh: Mesh) -> State:
    """The state before the first step, sharded as `denoise` leaves it, so that a second call is the same program."""
    state = init_state(latents, table.weights.shape[-1])
    return jax.device_put(state, jax.tree.map(functools.partial(NamedSharding, mesh), STATE))


def run_sampler(
    program: Callable[[State, Steps, Conditioning], tuple[State, AttentionMaps]],
    table: SamplerTable,
    latents: Array,
    conditioning: Conditioning,
    batch: SampleBatch,
    on_step: OnStep | None = None,
) -> tuple[Array, AttentionMaps]:
    """The latents (B, h, w, C) after all steps, and the attention maps where `program` gives them, as numpy arrays of
    the batch's samples. `program` is `denoise` with its first three arguments given. It makes all steps in one call, or
    with `on_step` each in a call of its own."""
    total = len(table.timestep)
    stochastic = bool(np.any(table.noise))
    state, maps = initial_state(latents, table, batch.mesh), []
    length = total if on_step is None else 1
    for first in range(0, total, length):
        part = slice(first, first + length)
        numbers = range(first, first + length)
        noise = jnp.stack([batch.noise(state.x.shape[1:], 1 + i) for i in numbers]) if stochastic else None
        steps = Steps(jax.tree.map(lambda field, part=part: field[part], table), noise)
        state, new = program(state, steps, conditioning.of_steps(part))
        maps.append(jax.device_get(new))  # maps of all steps would fill a device
        if on_step is not None:
            on_step(first, float(table.timestep[first]), state.x[: batch.count])
    return state.x, jax.tree.map(lambda *parts: np.concatenate(parts)[:, : batch.count], *maps)
