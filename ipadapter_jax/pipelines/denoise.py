"""The denoising loop: all steps of a sampler as one scan, sharded by sample over the devices."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ipadapter_jax.diffusion.parameterization import add_noise
from ipadapter_jax.diffusion.sampler_table import SamplerTable, State, init_state, sampler_step
from ipadapter_jax.pipelines.conditioning import BY_SAMPLE, REPLICATED, Conditioning, PreservedRegion, StepConditioning
from ipadapter_jax.pipelines.denoiser import Denoiser, DenoiserStep
from ipadapter_jax.pipelines.sample_batch import SampleBatch
from ipadapter_jax.runtime.trees import Params, PyTree

OnStep = Callable[[int, float, Array], None]
"""Called after every step with its number, its timestep and the latents (B, h, w, C)."""


class Steps(NamedTuple):
    """What the sampler takes for each of n steps."""

    table: SamplerTable  # (n, ...)
    noise: Array | None  # (n, B, h, w, C), for samplers that add noise


class DenoisedState(NamedTuple):
    """The sampler's state after n steps, and where the denoiser gives them their attention maps: per image branch and
    cross-attention layer (n, B, L, N)."""

    state: State
    maps: list[list[Array]] | None


class SampledLatents(NamedTuple):
    """The latents (B, h, w, C) after all steps, and the attention maps of all steps as in `DenoisedState`."""

    latents: Array
    maps: list[list[np.ndarray]] | None


class _StepInputs(NamedTuple):
    """What the scan takes for each of n steps."""

    steps: Steps
    known: DenoiserStep
    conditioning: StepConditioning


# PyTree: a sharding stands where the array stands.
_BY_STEP_AND_SAMPLE: PyTree = P(None, "data")
_BY_SAMPLE: PyTree = BY_SAMPLE
_REPLICATED: PyTree = REPLICATED
STATE = State(x=_BY_SAMPLE, aux_sample=_BY_SAMPLE, history=_BY_STEP_AND_SAMPLE)  # how each field is sharded
STEPS = Steps(table=_REPLICATED, noise=_BY_STEP_AND_SAMPLE)


def denoise(
    denoiser: Denoiser,
    mesh: Mesh,
    params: Mapping[str, Params],
    state: State,
    steps: Steps,
    conditioning: Conditioning,
) -> DenoisedState:
    """Makes the given steps with B samples. Denoiser and mesh are static."""

    def scan(params: Mapping[str, Params], state: State, steps: Steps, conditioning: Conditioning) -> DenoisedState:
        known = denoiser.steps(params, jnp.asarray(steps.table.timestep), conditioning)  # before the loop

        def body(state: State, step: _StepInputs) -> DenoisedState:
            table = step.steps.table
            x = jnp.asarray(table.input_scale) * state.x
            denoised = denoiser(params, x, step.known, conditioning.with_steps(step.conditioning))
            state = sampler_step(table, state, denoised.output, step.steps.noise)
            if conditioning.preserved is not None:
                state = state._replace(x=_with_preserved(state.x, conditioning.preserved, table))
            return DenoisedState(state, denoised.maps)

        inputs = _StepInputs(steps, known, conditioning.by_step())
        return DenoisedState(*jax.lax.scan(body, state, inputs))

    specs = (REPLICATED, STATE, STEPS, conditioning.specs())
    found = DenoisedState(STATE, _BY_STEP_AND_SAMPLE)
    sharded = jax.shard_map(scan, mesh=mesh, in_specs=specs, out_specs=found, check_vma=False)
    return sharded(params, state, steps, conditioning)


def _with_preserved(x: Array, preserved: PreservedRegion, table: SamplerTable) -> Array:
    """The original latents, as noisy as the samples (B, h, w, C) are, outside of the mask."""
    alpha, sigma = jnp.asarray(table.alpha), jnp.asarray(table.sigma)
    original = add_noise(alpha, sigma, preserved.latents, preserved.noise)
    return preserved.mask * x + (1 - preserved.mask) * original


def initial_state(latents: Array, table: SamplerTable, mesh: Mesh) -> State:
    """The state before the first step, sharded as `denoise` leaves it, so that a second call is the same program."""
    state = init_state(latents, table.weights.shape[-1])
    return jax.device_put(state, jax.tree.map(functools.partial(NamedSharding, mesh), STATE))


def run_sampler(
    program: Callable[[State, Steps, Conditioning], DenoisedState],
    table: SamplerTable,
    latents: Array,
    conditioning: Conditioning,
    batch: SampleBatch,
    on_step: OnStep | None = None,
) -> SampledLatents:
    """Makes all steps, in one call of `program`, or with `on_step` each in a call of its own. `program` is `denoise`
    with its first three arguments given. Attention maps are those of the batch's samples, without its padding."""
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
    of_samples = jax.tree.map(lambda *parts: np.concatenate(parts)[:, : batch.count], *maps)
    return SampledLatents(state.x, of_samples)
