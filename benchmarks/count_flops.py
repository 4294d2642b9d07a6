"""Counts the work of the UNet from its program. Only the configuration is read, and nothing is run.

    python -m benchmarks.count_flops                                 Stable Diffusion 1.5 at 512x512, 4 image tokens
    python -m benchmarks.count_flops --weights weights/tiny --height 256 --width 256

ipadapter_jax/runtime/flops.py defines what counts as work.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro

from benchmarks.abstract_programs import as_on
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import UNetConfig, cross_attention_layers
from ipadapter_jax.runtime import random_keys
from ipadapter_jax.runtime.flops import count_flops
from ipadapter_jax.weights.components import UNET, abstract_params

TEXT_TOKENS = 77


def unet_flops(
    config: UNetConfig, height: int, width: int, text_tokens: int = TEXT_TOKENS, image_tokens: int = 4
) -> Counter[str]:
    """One call for one latent (height, width), the keys and values of text and image prompt made in it."""
    unet = UNet(config)
    adapter = IPAdapter(tuple(site.width for site in cross_attention_layers(config)))

    def call(unet_params, adapter_params, latents, time, text, tokens):
        text_kv = unet.apply({"params": unet_params}, text, method=UNet.text_kv)
        entries = [adapter.apply(adapter_params, tokens)] if image_tokens else []
        weight = jnp.ones((len(entries), len(adapter.widths)))
        return unet.apply({"params": unet_params}, latents, time, text_kv, entries, weight)

    def example(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    latents, time = example(1, height, width, config.in_channels), example(1)
    text, tokens = (example(1, n, config.cross_attention_dim) for n in (text_tokens, image_tokens))
    adapter_params = jax.eval_shape(adapter.init, random_keys.key(0), tokens)
    with as_on("gpu"):  # as the network is written: on a CPU some convolutions are less work
        program = jax.make_jaxpr(call)(abstract_params(UNET, unet), adapter_params, latents, time, text, tokens)
    return count_flops(program)


def read_config(weights: Path) -> UNetConfig:
    """The UNet's of a base model in diffusers' layout."""
    return UNetConfig.from_json(json.loads((weights / "unet" / "config.json").read_text(encoding="utf-8")))


def main(
    weights: Annotated[Path | None, tyro.conf.arg(help="a base model in diffusers' layout; else SD 1.5")] = None,
    height: Annotated[int, tyro.conf.arg(help="of the image, in pixels")] = 512,
    width: int = 512,
    image_tokens: Annotated[int, tyro.conf.arg(help="4 for base adapters, 16 for plus, 257 for full, 0 for none")] = 4,
) -> None:
    """Prints the FLOP of one UNet call for one image; a step with guidance makes two calls."""
    config = UNetConfig() if weights is None else read_config(weights)
    counts = unet_flops(config, height // 8, width // 8, image_tokens=image_tokens)
    for kind, flops in (*sorted(counts.items()), ("total", counts.total())):
        print(f"{kind:8}{flops / 1e9:10.3f} GFLOP")


if __name__ == "__main__":
    tyro.cli(main)
