"""Where an adapter's training starts: its sizes, its first weights, or those of a released file."""

import dataclasses
import math
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ipadapter_jax.errors import InputError
from ipadapter_jax.models.clip_config import CLIPVisionConfig
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.models.image_projections import example_features, image_projection
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.ops.fast_params import parameter_shapes
from ipadapter_jax.runtime import random_keys
from ipadapter_jax.weights.ip_adapter_file import check_base, check_encoder, load_ip_adapter, open_ip_adapter
from ipadapter_jax.weights.load_tree import Tree, leaves, nest


def projection_config(
    variant: str,
    encoder: CLIPVisionConfig,
    cross_attention_dim: int,
    *,
    num_tokens: int | None = None,
    heads: int = 12,
    depth: int = 4,
) -> ImageProjConfig:
    """The image projection of a variant for this encoder and this width of text, with the released sizes by default.

    "base": num_tokens (4) from the projected embedding; "plus": num_tokens (16) from a Resampler of `heads` x 64 and
    `depth` layers over the penultimate states; "full": one token for every position of the encoder. diffusers reads
    base files with 4 tokens only, and plus files of depth 4.
    """
    if variant == "base":
        return ImageProjConfig("base", encoder.projection_dim, cross_attention_dim, num_tokens or 4)
    if variant == "full":
        return ImageProjConfig("full", encoder.hidden_size, cross_attention_dim, encoder.num_positions)
    assert variant == "plus", variant
    return ImageProjConfig(
        "plus",
        feature_dim=encoder.hidden_size,
        cross_attention_dim=cross_attention_dim,
        num_tokens=num_tokens or 16,
        hidden_dim=cross_attention_dim,
        heads=heads,
        depth=depth,
    )


def init_adapter(
    unet_params: Tree, unet_config: UNetConfig, projection: ImageProjConfig, seed: ArrayLike
) -> dict[str, Tree]:
    """The trees {"image_proj", "ip_adapter"} in float32 before the first step. Paper, section 3.2.2.

    to_k_ip and to_v_ip are copies of the UNet's own to_k and to_v, as exact as `unet_params` are; the projection is
    initialized as PyTorch does it. Pure, so that it may run inside jax.jit with any out_shardings: a leaf depends on
    the seed and on its own path alone."""
    return {
        "image_proj": _init_projection(projection, random_keys.key(seed)),
        "ip_adapter": _text_keys_values(unet_params, unet_config),
    }


def _text_keys_values(unet_params: Tree, config: UNetConfig) -> Tree:
    tree: Tree = {}
    for i, layer in enumerate(cross_attention_layers(config)):
        attention = layer.subtree(unet_params)
        kernels = {name: jnp.array(attention[name]["kernel"], jnp.float32) for name in ("to_k", "to_v")}
        tree[str(2 * i + 1)] = {f"{name}_ip": {"kernel": kernel} for name, kernel in kernels.items()}
    return tree


def _init_projection(config: ImageProjConfig, key: Array) -> Tree:
    module = image_projection(config)
    template = leaves(parameter_shapes(module, example_features(config)))

    def initialize(path: tuple[str, ...]) -> Array:
        shape = template[path].shape
        own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        if path == ("latents",):
            # A barrier, or a compiler would fold the two scales and round otherwise than without jit.
            return jax.lax.optimization_barrier(jax.random.normal(own, shape, jnp.float32)) / math.sqrt(shape[-1])
        kernel = template.get((*path[:-1], "kernel"))
        if kernel is None:  # a LayerNorm
            return (jnp.ones if path[-1] == "scale" else jnp.zeros)(shape, jnp.float32)
        # A Linear: weight and bias alike. A number in [-1, 1) is exact however a compiler contracts it.
        return jax.random.uniform(own, shape, jnp.float32, minval=-1.0, maxval=1.0) * (1 / math.sqrt(kernel.shape[0]))

    return nest({path: initialize(path) for path in template})


def load_adapter_params(path: Path, unet_config: UNetConfig, projection: ImageProjConfig) -> dict[str, Tree]:
    """The same trees, as numpy arrays, from a released or exported adapter file, to train it further.

    Raises WeightFileError or InputError when the file does not fit the base model, the image encoder or the sizes of
    this run, naming what differs.
    """
    file = open_ip_adapter(path)
    widths = tuple(site.width for site in cross_attention_layers(unet_config))
    check_base(file, unet_config.cross_attention_dim, widths)
    if file.config.variant == projection.variant:  # else other features are no fault of the encoder
        check_encoder(file, projection.feature_dim, projection.feature_dim, "of this run")
    _check_same_sizes(path, file.config, projection)
    return load_ip_adapter(file, widths, np.dtype("float32"), put=lambda array: array)


def _check_same_sizes(path: Path, found: ImageProjConfig, wanted: ImageProjConfig) -> None:
    theirs, ours = dataclasses.asdict(found), dataclasses.asdict(wanted)
    if wanted.variant == "full":  # its tokens are the encoder's positions, which no file states
        theirs["num_tokens"] = ours["num_tokens"]
    differing = [name for name in ours if theirs[name] != ours[name]]
    if differing:
        names = ["variant"] if "variant" in differing else differing
        differences = ", ".join(f"{name}={theirs[name]} (this run: {ours[name]})" for name in names)
        raise InputError(f"{path}: training cannot start from this adapter, it has {differences}; change one of them")
