"""The jitted functions behind `StableDiffusion`: conditions once, the denoising loop as one scan, the decoder.

All are pure: networks and schedule are static, weights and everything a person may change (prompts, pictures, scales,
guidance, seeds) are arguments, so only a new shape compiles again. B images have G branches each: one, or with
classifier-free guidance two, the unconditional first; row b * G + g of a network's batch is branch g of image b.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ipadapter_jax.diffusion.guidance import guide
from ipadapter_jax.diffusion.steps import State, Steps, advance
from ipadapter_jax.models.adapter import IPAdapter
from ipadapter_jax.models.clip import CLIPText, CLIPVision
from ipadapter_jax.models.projections import Projection
from ipadapter_jax.models.unet import KeyValue, UNet
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.weights.tree import Tree


def _apply(module: Any, params: Tree, *inputs: Any, method: Callable | None = None) -> Any:
    return module.apply({"params": params}, *inputs, method=method)


def device_mesh() -> Mesh:
    """All devices of this process along one axis, over which the images of a batch are spread."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def by_image(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P("data"))


@functools.partial(jax.jit, static_argnums=(0, 3))
def draw_noise(shape: tuple[int, ...], seeds: Array, step: Array, mesh: Mesh) -> Array:
    """Standard normal (B, *shape), row i drawn from seeds[i] and the step alone (0: the initial latents)."""

    def draw(seed):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), step), shape, jnp.float32)

    return jax.lax.with_sharding_constraint(jax.vmap(draw)(seeds), by_image(mesh))


class Batch:
    """The B images of one call, filled up to a multiple of the devices by repeating the last one."""

    def __init__(self, mesh: Mesh, seeds: np.ndarray, prompt_of_image: np.ndarray):
        self.mesh, self.count = mesh, len(seeds)
        self._seeds = self.spread(seeds)
        self.prompt_of_image = self.spread(prompt_of_image)

    def spread(self, rows: np.ndarray) -> Array:
        """Rows (B, ...) over the devices."""
        filled = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % self.mesh.size, axis=0)])
        return jax.device_put(filled, by_image(self.mesh))

    def noise(self, shape: tuple[int, ...], step: int) -> Array:
        """Standard normal rows of `shape` for a step, 0 being the initial latents."""
        return draw_noise(shape, self._seeds, np.uint32(step), self.mesh)


@functools.partial(jax.jit, static_argnums=0)
def encode_prompt(text_encoder: CLIPText, params: Tree, input_ids: Array) -> Array:
    """Token ids (P, S) -> text states (P, S, D)."""
    return _apply(text_encoder, params, input_ids).last_hidden_state


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode_image(encoder: CLIPVision, patches: bool, params: Tree, pixel_values: Array) -> Array:
    """Normalised pixels (n, H, W, 3) -> embeddings (n, F), or with `patches` the penultimate states (n, L, F)."""
    output = _apply(encoder, params, pixel_values)
    return output.hidden_states[-2] if patches else output.image_embeds


@functools.partial(jax.jit, static_argnums=(0, 1))
def image_keys_values(projection: Projection, adapter: IPAdapter, params: Tree, features: Array) -> list[KeyValue]:
    """Features (G, n, ...) of n pictures -> per site keys and values (G, n N, C), the tokens of all in one row."""
    branches, images, *rest = features.shape
    tokens = _apply(projection, params["image_proj"], features.reshape(branches * images, *rest))
    return _apply(adapter, params["ip_adapter"], tokens.reshape(branches, -1, tokens.shape[-1]))


@functools.partial(jax.jit, static_argnums=0)
def text_keys_values(unet: UNet, params: Tree, text: Array) -> list[KeyValue]:
    """Text states (P, G, S, D) -> per site keys and values (P, G, S, C)."""
    rows = _apply(unet, params, text.reshape(-1, *text.shape[2:]), method=UNet.text_kv)
    return jax.tree.map(lambda x: x.reshape(*text.shape[:2], *x.shape[1:]), rows)


_STATE: Any = State._make((P("data"), P("data"), P(None, "data")))  # over the devices, by image


def placed(state: State, mesh: Mesh) -> State:
    """The state where `denoise` leaves it, so that a second call is the same program as the first."""
    return jax.device_put(state, State._make(NamedSharding(mesh, spec) for spec in _STATE))


@functools.partial(jax.jit, static_argnums=(0, 1))
def denoise(
    unet: UNet,
    mesh: Mesh,
    params: Tree,
    state: State,
    steps: Steps,
    noise: Array | None,
    prompt_of_image: Array,
    text_kv: list[KeyValue],
    image_kv: Sequence[list[KeyValue]],
    image_weight: Array,
    guidance_scale: Array,
) -> State:
    """Latents (B, h, w, 4) and what the sampler keeps of them through the given steps (n,): one scan.

    noise (n, B, h, w, 4) for stochastic samplers, prompt_of_image (B,) picks a row of text_kv (P, G, S, C); image_kv
    holds (G, N, C) per entry and site, image_weight (entries, sites).
    """

    def run(state, noise, prompt_of_image, steps, params, text_kv, image_kv, image_weight, guidance_scale):
        images, branches = state.x.shape[0], text_kv[0][0].shape[1]
        text_rows = jax.tree.map(lambda x: x[prompt_of_image].reshape(-1, *x.shape[2:]), text_kv)
        image_rows = jax.tree.map(lambda x: jnp.tile(x, (images, 1, 1)), image_kv)

        def body(state, inputs):
            step, fresh = inputs
            time = jnp.full((images,), step.timestep)
            output = _apply(unet, params, step.input_scale * state.x, time, text_rows, image_rows, image_weight)
            output = output.reshape(images, branches, *output.shape[1:])
            output = guide(output, guidance_scale) if branches == 2 else output[:, 0]
            return advance(step, state, output, fresh), None

        return jax.lax.scan(body, state, (steps, noise))[0]

    specs = (_STATE, P(None, "data"), P("data"), P(), P(), P(), P(), P(), P())
    over_devices = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=_STATE, check_vma=False)
    return over_devices(state, noise, prompt_of_image, steps, params, text_kv, image_kv, image_weight, guidance_scale)


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode(vae: VAE, mesh: Mesh, params: Tree, latents: Array) -> Array:
    """Latents (B, h, w, 4) -> pictures (B, H, W, 3) float32 about [-1, 1], one at a time to bound the memory."""

    def run(latents, params):
        def one(row):
            return _apply(vae, params, row[None] / vae.config.scaling_factor, method=VAE.decode)[0]

        return jax.lax.map(one, latents)

    return jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)(
        latents, params
    )
