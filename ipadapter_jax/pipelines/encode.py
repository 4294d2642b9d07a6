"""What runs once per call, before and after the denoising loop: text and images to what the networks are conditioned
on, pixels to latents and back. Pure functions; the networks are static, everything that a person changes is an array.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ipadapter_jax.models import forward
from ipadapter_jax.models.clip import CLIPVision, clip_features
from ipadapter_jax.models.image_features import FeatureKind
from ipadapter_jax.models.image_projections import Projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.models.text_encoders import TextConditioning, TextEncoders
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.ops.attention import KeyValue
from ipadapter_jax.runtime.trees import Params
from ipadapter_jax.weights.load_tree import Tree


def encode_prompts(
    encoders: TextEncoders, clip_skip: int, params: Mapping[str, Params], ids: Mapping[str, Array]
) -> TextConditioning:
    """Token ids (P, S) of each text encoder -> what P prompts condition on, without the last `clip_skip` layers."""
    return encoders(params, ids, clip_skip)


def encode_image(encoder: CLIPVision, kind: FeatureKind, params: Tree, pixel_values: Array) -> Array:
    """Normalized pixels (n, H, W, 3) -> features of this kind, (n, F) or (n, L, F)."""
    return clip_features(forward.apply(encoder, params, pixel_values), kind)


def image_keys_values(
    projection: Projection, adapter: IPAdapter, params: Tree, features: Array, weight: Array
) -> list[KeyValue]:
    """Features (Q, G, n, ...) of Q prompts of n images -> per layer keys and values (Q, G, n N, C): the tokens of a
    prompt's images in one sequence, the values of each image times its weight (Q or 1, n)."""
    prompts, branches, _, *rest = features.shape
    kv, tokens = forward.image_keys_values(projection, adapter, params, features.reshape(-1, *rest), prompts * branches)
    of_token = jnp.repeat(jnp.asarray(weight), tokens, axis=1)[:, None, :, None]  # (Q or 1, 1, n N, 1)

    def by_prompt(x: Array) -> Array:
        x = x.reshape(prompts, branches, *x.shape[1:])
        return jnp.broadcast_to(x, (max(prompts, len(of_token)), *x.shape[1:]))

    return [KeyValue(by_prompt(k), (by_prompt(v) * of_token).astype(v.dtype)) for k, v in kv]


def text_keys_values(unet: UNet, params: Tree, text: Array) -> list[KeyValue]:
    """Text states (P, G, S, D) -> per layer keys and values (P, G, S, C)."""
    kv = forward.text_keys_values(unet, params, text.reshape(-1, *text.shape[2:]))
    return jax.tree.map(lambda x: x.reshape(*text.shape[:2], *x.shape[1:]), kv)


def encode_init_image(vae: VAE, params: Tree, images: Array, noise: Array) -> Array:
    """Images (n, H, W, 3) in [-1, 1] and standard normal noise (B, h, w, C) -> latents (B, h, w, C), samples of the
    posterior of image 0, or each of its own."""
    return forward.apply(vae, params, images, noise, method=VAE.encode)


def decode(vae: VAE, mesh: Mesh, params: Tree, latents: Array) -> Array:
    """Latents (B, h, w, C) -> images (B, H, W, 3) float32 about [-1, 1], one at a time to bound the memory."""

    def run(latents: Array, params: Tree) -> Array:
        def one(sample: Array) -> Array:
            return forward.apply(vae, params, sample[None], method=VAE.decode)[0]

        return jax.lax.map(one, latents)

    specs = (P("data"), P())
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
    return sharded(latents, params)
