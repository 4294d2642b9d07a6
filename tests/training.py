"""What the training tests share: the recorded tiny model as a run, and the authors' recorded draws."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from helpers import ADAPTERS, IMAGE_ENCODER, ORACLES, TORCH_MODEL, Case, nhwc

from ipadapter_jax.preprocess import clip_pixels, load_image
from ipadapter_jax.train.config import Data, Model, Train
from ipadapter_jax.train.step import Draws

TINY = Train(
    model=Model(base=str(TORCH_MODEL), image_encoder=str(IMAGE_ENCODER), dtype="float32"),
    data=Data(path="given", resolution=128, batch_size=8),
)


def tiny(**changes) -> Train:
    """TINY with dotted names changed, `model__adapter="plus"` for instance."""
    config = TINY
    for name, value in changes.items():
        part, _, setting = name.rpartition("__")
        if part:
            value = dataclasses.replace(getattr(config, part), **{setting: value})
        config = dataclasses.replace(config, **{part or setting: value})
    return config


def recorded_batch(case: Case) -> dict[str, np.ndarray]:
    pictures = [load_image(ORACLES / "assets" / f"{name}.png") for name in case.meta["images"]["clip_images"]]
    return {
        "pixels": nhwc(case.inputs["images"]),
        "clip_pixels": np.stack([clip_pixels(picture, 224) for picture in pictures]),
        "input_ids": case.inputs["text_input_ids"],
    }


def recorded_draws(case: Case, step: int = 0) -> Draws:
    drop = case.inputs["drop_image_embeds"].astype(bool)
    return Draws(
        drop_image=jnp.asarray(drop),
        drop_text=jnp.zeros(len(drop), bool),  # the recorded ids are those after dropping
        timestep=jnp.asarray(case.inputs[f"timesteps_{step}"]),
        noise=jnp.asarray(nhwc(case.inputs[f"noise_{step}"])),
        posterior_noise=jnp.asarray(nhwc(case.inputs[f"vae_noise_{step}"])),
    )


LIGHT = ADAPTERS / "ip-adapter_tiny_light.bin"
PLUS = ADAPTERS / "ip-adapter-plus_tiny.bin"
