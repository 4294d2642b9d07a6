"""The jitted functions behind `StableDiffusion`: conditions once, the denoising loop as one scan, the decoder.

All are pure: networks and schedule are static, weights and everything a person may change (prompts, images, scales,
guidance, seeds) are arguments, so only a new shape compiles again. B images have G branches each: one, or with
classifier-free guidance two, the unconditional first; row b * G + g of a network's batch is branch g of image b.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from ipadapter_jax.diffusion.guidance import guide
from ipadapter_jax.diffusion.parameterization import add_noise
from ipadapter_jax.diffusion.sampler_table import SamplerTable, State, init_state, sampler_step
from ipadapter_jax.models.clip import CLIPText, CLIPVision
from ipadapter_jax.models.image_projections import Projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.models.unet import KeyValue, UNet
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.runtime.export_cache import export_cached, register_serializable
from ipadapter_jax.runtime.mesh import batch_sharding
from ipadapter_jax.runtime.random_keys import key
from ipadapter_jax.weights.load_tree import Tree


def _apply(module: Any, params: Tree, *inputs: Any, method: Callable | None = None) -> Any:
    return module.apply({"params": params}, *inputs, method=method)


@functools.partial(jax.jit, static_argnums=(0, 3))
def draw_noise(shape: tuple[int, ...], seeds: Array, step: Array, mesh: Mesh) -> Array:
    """Standard normal (B, *shape), row i drawn from seeds[i] and the step alone (0: the initial latents)."""

    def draw(seed):
        return jax.random.normal(jax.random.fold_in(key(seed), step), shape, jnp.float32)

    return jax.lax.with_sharding_constraint(jax.vmap(draw)(seeds), batch_sharding(mesh))


class SampleBatch:
    """The B images of one call, filled up to a multiple of the devices by repeating the last one."""

    def __init__(
        self, mesh: Mesh, seeds: np.ndarray, prompt_of_image: np.ndarray, given: Mapping[int, np.ndarray] | None = None
    ):
        """`given` holds noise by number (`noise.py`), which is used instead of draws from the seeds."""
        self.mesh, self.count, self._given = mesh, len(seeds), given or {}
        self._seeds = self.sharded(seeds)
        self.prompt_of_image = self.sharded(prompt_of_image)

    def sharded(self, samples: np.ndarray) -> Array:
        """Samples (B, ...) sharded over the devices, filled up."""
        filled = np.concatenate([samples, np.repeat(samples[-1:], -len(samples) % self.mesh.size, axis=0)])
        return jax.device_put(filled, batch_sharding(self.mesh))

    def noise(self, shape: tuple[int, ...], step: int) -> Array:
        """Standard normal (B, *shape), the draw of this number (see `noise.py`)."""
        if step in self._given:
            return self.sharded(self._given[step])
        return draw_noise(shape, self._seeds, np.uint32(step), self.mesh)


@export_cached(2)
def encode_prompt(text_encoder: CLIPText, clip_skip: int, params: Tree, input_ids: Array) -> Array:
    """Token ids (P, S) -> text states (P, S, D), without the last `clip_skip` layers."""
    return _apply(text_encoder, params, input_ids, clip_skip).last_hidden_state


@export_cached(2)
def encode_image(encoder: CLIPVision, patches: bool, params: Tree, pixel_values: Array) -> Array:
    """Normalised pixels (n, H, W, 3) -> embeddings (n, F), or with `patches` the penultimate states (n, L, F)."""
    output = _apply(encoder, params, pixel_values)
    return output.hidden_states[-2] if patches else output.image_embeds


@export_cached(2)
def image_keys_values(
    projection: Projection, adapter: IPAdapter, params: Tree, features: Array, weight: Array
) -> list[KeyValue]:
    """Features (Q, G, n, ...) of Q prompts of n images -> per site keys and values (Q, G, n N, C), the tokens of a
    prompt in one row, the values of each image times its weight (Q or 1, n)."""
    prompts, branches, _, *rest = features.shape
    tokens = _apply(projection, params["image_proj"], features.reshape(-1, *rest))
    rows = _apply(adapter, params["ip_adapter"], tokens.reshape(prompts * branches, -1, tokens.shape[-1]))
    of_token = jnp.repeat(jnp.asarray(weight), tokens.shape[-2], axis=1)[:, None, :, None]  # (Q or 1, 1, n N, 1)

    def by_prompt(x: Array) -> Array:
        x = x.reshape(prompts, branches, *x.shape[1:])
        return jnp.broadcast_to(x, (max(prompts, len(of_token)), *x.shape[1:]))

    return [(by_prompt(k), (by_prompt(v) * of_token).astype(v.dtype)) for k, v in rows]


@export_cached(1)
def text_keys_values(unet: UNet, params: Tree, text: Array) -> list[KeyValue]:
    """Text states (P, G, S, D) -> per site keys and values (P, G, S, C)."""
    rows = _apply(unet, params, text.reshape(-1, *text.shape[2:]), method=UNet.text_kv)
    return jax.tree.map(lambda x: x.reshape(*text.shape[:2], *x.shape[1:]), rows)


class Conditions(NamedTuple):
    """What the denoising of B images is told, beside the step: P text prompts, E image entries (an adapter, or one of
    its images with a mask) of Q image prompts, s sites."""

    prompt_of_image: Array  # (B,), a row of text_kv
    reference_of_image: Array  # (B,), a row of image_kv
    text_kv: list[KeyValue]  # per site (P, G, S, C)
    image_kv: Sequence[list[KeyValue]]  # per entry and site (Q, G, N, C)
    image_masks: Sequence[ArrayLike]  # per site (E, L): where in the image an entry acts
    guidance_scale: ArrayLike
    guidance_rescale: ArrayLike


class Kept(NamedTuple):
    """What is put back after every step where an inpainting mask (B, h, w, 1) is 0: latents and their noise."""

    mask: Array
    latents: Array
    noise: Array


class Start(NamedTuple):
    """What a run begins with: latents (B, h, w, 4); what a UNet of 4 channels gets back after every step; what an
    inpainting one of 9 is shown beside the latents, mask and masked image (B, h, w, 5)."""

    latents: Array
    kept: Kept | None = None
    more_channels: Array | None = None


class Inputs(NamedTuple):
    """What each of n steps takes, along the leading axis: a scan walks it."""

    steps: SamplerTable
    noise: Array | None  # (n, B, h, w, 4) for stochastic samplers
    image_weight: ArrayLike  # (n, E, G, s)


register_serializable(State, SamplerTable, Conditions, Kept, Inputs)

_BY_IMAGE = P("data")
STATE: Any = State._make((_BY_IMAGE, _BY_IMAGE, P(None, "data")))  # over the devices, by image
_INPUTS: Any = Inputs._make((P(), P(None, "data"), P()))
_CONDITIONS: Any = Conditions._make((_BY_IMAGE, _BY_IMAGE, P(), P(), P(), P(), P()))


def placed(state: State, mesh: Mesh) -> State:
    """The state where `denoise` leaves it, so that a second call is the same program as the first."""
    return jax.device_put(state, State._make(NamedSharding(mesh, spec) for spec in STATE))


@export_cached(3)
def denoise(
    unet: UNet,
    mesh: Mesh,
    maps: bool,
    params: Tree,
    state: State,
    inputs: Inputs,
    conditions: Conditions,
    kept: Kept | None = None,
    more_channels: Array | None = None,
) -> tuple[State, Any]:
    """Latents (B, h, w, 4) and what the sampler keeps of them through the given steps: one scan.

    kept: for inpainting with a UNet of 4 channels; more_channels (B, h, w, 5): for one of 9, mask and masked image.
    With `maps` also the attention of every step to the image tokens, per entry and site (n, B, L, N), else None.
    """

    def run(state, inputs, conditions, kept, more_channels, params):
        branches = conditions.text_kv[0][0].shape[1]
        text_rows, image_rows = _rows(conditions)
        time_shifts = _apply(unet, params, inputs.steps.timestep, method=UNet.time_shifts)  # of all steps at once

        def body(state, of_step):
            inputs, time_shifts = of_step
            step, weight = inputs.steps, _site_weights(inputs.image_weight, conditions.image_masks, state.x.shape[0])
            x = step.input_scale * state.x
            x = x if more_channels is None else jnp.concatenate([x, more_channels], axis=-1)
            time_shifts = jax.tree.map(lambda shift: shift[None], time_shifts)  # the same for every row
            output, seen = _with_maps(unet, maps, params, x, time_shifts, text_rows, image_rows, weight)
            output = output.reshape(-1, branches, *output.shape[1:])
            if branches == 2:
                output = guide(output, conditions.guidance_scale, conditions.guidance_rescale)
            else:
                output = output[:, 0]
            state = sampler_step(step, state, output, inputs.noise)
            if kept is not None:
                original = add_noise(step.alpha, step.sigma, kept.latents, kept.noise)
                state = state._replace(x=kept.mask * state.x + (1 - kept.mask) * original)
            return state, jax.tree.map(lambda rows: rows[branches - 1 :: branches], seen)

        return jax.lax.scan(body, state, (inputs, time_shifts))

    specs = (STATE, _INPUTS, _CONDITIONS, _BY_IMAGE, _BY_IMAGE, P())
    over_devices = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(STATE, P(None, "data")), check_vma=False)
    return over_devices(state, inputs, conditions, kept, more_channels, params)


def _rows(conditions: Conditions) -> tuple[list[KeyValue], list[list[KeyValue]]]:
    """Keys and values by row of the network's batch."""

    def pick(tree, of_image):  # one prompt of an adapter may serve all images
        return jax.tree.map(lambda x: x[jnp.minimum(of_image, len(x) - 1)].reshape(-1, *x.shape[2:]), tree)

    text = pick(conditions.text_kv, conditions.prompt_of_image)
    return text, pick(list(conditions.image_kv), conditions.reference_of_image)


def _site_weights(weight: Array, masks: Sequence[Array], images: int) -> list[list[Array]]:
    """Weights (E, G, s) of a step and masks as the network takes them: per entry and site (R, L, 1)."""
    rows = jnp.tile(weight, (1, images, 1))
    return [
        [rows[entry, :, site, None, None] * mask[entry, None, :, None] for site, mask in enumerate(masks)]
        for entry in range(weight.shape[0])
    ]


def _with_maps(unet: UNet, maps: bool, params: Tree, *inputs: Any) -> tuple[Array, Any]:
    if not maps:
        return _apply(unet, params, *inputs, method=UNet.at), None
    output, seen = unet.apply({"params": params}, *inputs, method=UNet.at, mutable=["maps"])
    return output, UNet.maps_of(seen["maps"], unet.config)


OnStep = Callable[[int, float, Array], None]
"""Called after every step with its number, its timestep and the latents (B, h, w, 4)."""


def run_steps(
    denoise: Callable,
    steps: SamplerTable,
    image_weight: np.ndarray,
    conditions: Conditions,
    batch: SampleBatch,
    start: Start,
    on_step: OnStep | None,
) -> tuple[Array, Any]:
    """All steps in one call of `denoise` (without its first four arguments), or with `on_step` one call per step: final
    latents and, where `denoise` gives them, the attention maps of all steps as numpy arrays."""
    stochastic, total = bool(np.any(steps.noise)), len(steps.timestep)
    state, seen = placed(init_state(start.latents, steps.weights.shape[-1]), batch.mesh), []
    length = total if on_step is None else 1
    for first in range(0, total, length):
        part = slice(first, first + length)
        numbers = range(first, first + length)
        noise = jnp.stack([batch.noise(state.x.shape[1:], 1 + i) for i in numbers]) if stochastic else None
        inputs = Inputs(jax.tree.map(lambda field, part=part: field[part], steps), noise, image_weight[part])
        state, new = denoise(state, inputs, conditions, start.kept, start.more_channels)
        seen.append(jax.device_get(new))  # maps of all steps would fill a device
        if on_step is not None:
            on_step(first, float(steps.timestep[first]), state.x[: batch.count])
    return state.x, jax.tree.map(lambda *parts: np.concatenate(parts)[:, : batch.count], *seen)


@export_cached(1)
def encode_init_image(vae: VAE, params: Tree, images: Array, noise: Array) -> Array:
    """Images (n, H, W, 3) in [-1, 1] and standard normal noise (B, h, w, 4) -> latents (B, h, w, 4), drawn from the
    posterior of image 0, or each of its own."""
    return _apply(vae, params, images, noise, method=VAE.encode)


@export_cached(2)
def decode(vae: VAE, mesh: Mesh, params: Tree, latents: Array) -> Array:
    """Latents (B, h, w, 4) -> images (B, H, W, 3) float32 about [-1, 1], one at a time to bound the memory."""

    def run(latents, params):
        def one(row):
            return _apply(vae, params, row[None], method=VAE.decode)[0]

        return jax.lax.map(one, latents)

    return jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)(
        latents, params
    )
