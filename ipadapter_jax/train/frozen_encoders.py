"""The frozen networks that see images, VAE and image encoder, on all devices of this process."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from ipadapter_jax.images.preprocess import CLIP_TABLE
from ipadapter_jax.models.clip import CLIPVision
from ipadapter_jax.models.image_features import FeatureKind
from ipadapter_jax.models.vae import VAE, normalize
from ipadapter_jax.pipelines import encode, programs
from ipadapter_jax.runtime.mesh import batch_sharding, local_mesh, replicated
from ipadapter_jax.runtime.trees import Params, PyTree
from ipadapter_jax.weights.image_encoder import open_image_encoder
from ipadapter_jax.weights.open_base_model import open_base_folder
from ipadapter_jax.weights.open_component import LoadedComponent


class EncodedImages(NamedTuple):
    """What both networks make of B images, in their dtype."""

    features: Array  # (B, F), or with patches (B, L, F)
    finite: Array  # (B,) bool: whether all of a sample is
    logvar: Array  # (B, h, w, 4), of the latents' posterior, unscaled
    mean: Array  # (B, h, w, 4)


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenEncoders:
    """The frozen networks on all devices of this process, and what identifies them."""

    vae: LoadedComponent
    image_encoder: LoadedComponent
    kind: FeatureKind
    mesh: jax.sharding.Mesh
    tokenizer: Path
    text_length: int  # tokens of a caption, as many as the base model's text encoder reads
    pixel_step: int  # images must be a multiple of it: VAE and UNet halve them so often

    @property
    def clip_size(self) -> int:
        return self.image_encoder.module.config.image_size

    def __call__(self, pixels: np.ndarray, clip_pixels: np.ndarray) -> EncodedImages:
        """Takes (B, H, W, 3) and (B, S, S, 3) uint8, B a multiple of the devices. Does not wait for the result."""
        images = jax.device_put((pixels, clip_pixels), batch_sharding(self.mesh))
        return self._encode(*images)

    def shapes(self, resolution: int) -> EncodedImages:
        """The shapes and dtypes (jax.ShapeDtypeStruct) for a batch of one sample per device."""
        sides = (resolution, self.clip_size)
        return jax.eval_shape(
            self._encode, *(jax.ShapeDtypeStruct((self.mesh.size, side, side, 3), jnp.uint8) for side in sides)
        )

    def _encode(self, pixels: Array, clip_pixels: Array) -> EncodedImages:
        params = self.vae.params, self.image_encoder.params
        return _encode(self.vae.module, self.image_encoder.module, self.kind, self.mesh, params, pixels, clip_pixels)

    def zero_features(self) -> np.ndarray | None:
        """(L, F), the states of zero pixels: what a dropped image is where patches are read."""
        if not self.kind.has_positions:
            return None
        zeros = jnp.zeros((1, self.clip_size, self.clip_size, 3))
        return np.asarray(
            programs.encode_image(self.image_encoder.module, self.kind, self.image_encoder.params, zeros)[0]
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _encode(
    vae: VAE,
    image_encoder: CLIPVision,
    kind: FeatureKind,
    mesh: jax.sharding.Mesh,
    params: tuple[Params, Params],
    pixels: Array,
    clip_pixels: Array,
) -> EncodedImages:
    def run(params, pixels, clip_pixels):
        posterior: PyTree = vae.apply({"params": params[0]}, normalize(pixels), method=VAE.posterior)
        normalized = jnp.asarray(CLIP_TABLE)[clip_pixels, jnp.arange(3)]
        mean, logvar = (moment.astype(vae.dtype) for moment in posterior)
        features = encode.encode_image(image_encoder, kind, params[1], normalized)
        finite = [jnp.isfinite(x).all(axis=range(1, x.ndim)) for x in (mean, logvar, features)]
        return EncodedImages(features, functools.reduce(jnp.logical_and, finite), logvar, mean)

    batch_spec = P("data")
    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), batch_spec, batch_spec), out_specs=batch_spec, check_vma=False
    )
    return sharded(params, pixels, clip_pixels)


def load_frozen_encoders(
    base: str, variant: str | None, image_encoder: str, dtype: str, patches: bool
) -> FrozenEncoders:
    """Reads both networks. Raises InputError and WeightFileError as the readers do."""
    model, vision, mesh = open_base_folder(base, variant), open_image_encoder(image_encoder), local_mesh()
    put = functools.partial(jax.device_put, device=replicated(mesh))
    model.check_tokenizer()
    length, levels = model.config("text_encoder").max_position_embeddings, model.config("unet").levels
    step = model.config("vae").downscale * 2 ** (levels - 1)
    vae, encoder = (part.load(np.dtype(dtype), put) for part in (model.part("vae"), vision))
    kind = FeatureKind.PENULTIMATE_STATES if patches else FeatureKind.IMAGE_EMBEDS
    return FrozenEncoders(vae, encoder, kind, mesh, model.folder / "tokenizer", length, step)
