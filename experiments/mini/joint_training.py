"""The paper's alternatives to decoupled cross-attention: image tokens appended to the text tokens, or in their place.

"simple" is the adapter of the ablation: image tokens are appended to the text tokens, the frozen cross-attention layers
read both as one sequence, and only the image projection is trained. "full" is full fine-tuning: the tokens of the image
embedding replace the text tokens, and the whole UNet is trained with the projection.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from ipadapter_jax.models.clip import TextOutput
from ipadapter_jax.models.clip_config import CLIPTextConfig
from ipadapter_jax.models.families import SD1
from ipadapter_jax.models.text_encoders import TextEncoders
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion
from ipadapter_jax.train import trainer
from ipadapter_jax.train.build import Variation
from ipadapter_jax.train.config import Train
from ipadapter_jax.train.networks import Networks

Joined = Literal["simple", "full"]
LEARNS: dict[Joined, tuple[str, ...]] = {"simple": ("image_proj",), "full": ("unet", "image_proj")}


def join(how: Joined, text: Array, tokens: Array) -> Array:
    """Text states (B, S, D) and image tokens (B, N, D) -> what cross-attention layers attend to, (B, S + N or N, D)."""
    return jnp.concatenate([text, tokens.astype(text.dtype)], axis=1) if how == "simple" else tokens


def train(config: Train, how: Joined) -> int:
    """Trains as `ipadapter-jax train`, but with `join` instead of decoupled cross-attention. Returns the exit code."""

    def joined(plain: Networks) -> Networks:
        parts = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        return _Networks(**parts, how=how)

    return trainer.train(config, Variation(joined, {"joined": how}))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Networks(Networks):
    how: Joined = "simple"

    def predict(
        self, params: dict[str, Any], noisy: Array, timestep: Array, text: Array, features: Array | None
    ) -> Array:
        unet: Any = self.unet
        projection: Any = self.projection
        tokens = projection.apply({"params": params["image_proj"]}, features)
        context = join(self.how, text, tokens)
        return unet.apply({"params": params["unet"]}, noisy, timestep, context, method=UNet.from_text)


def with_image(pipe: StableDiffusion, how: Joined, image: np.ndarray, guided: bool) -> StableDiffusion:
    """A pipeline whose text states hold the tokens of this image (H, W, 3) uint8, joined by `join`. Of the adapter of
    `pipe` only the image projection is used."""
    adapter = pipe.adapters[0]
    encoder: Any = _TextAndImage(pipe.text_encoder, adapter.projection, how)
    features = adapter.encode(adapter.inputs.from_images([[image]], "crop", guided))[0, :, 0]
    both = {"text": pipe.params["text_encoder"], "image_proj": adapter.params["image_proj"], "features": features}
    text = dataclasses.replace(pipe.text, encoders=TextEncoders.of(SD1, {"text_encoder": encoder}))
    return dataclasses.replace(pipe, text=text, params={**pipe.params, "text_encoder": both}, adapters=())


@dataclasses.dataclass(frozen=True)
class _TextAndImage:
    """Takes the place of a text encoder; its states also hold the tokens of an image."""

    text: Any  # a CLIPText
    projection: Any  # a Projection
    how: Joined

    @property
    def config(self) -> CLIPTextConfig:
        return self.text.config

    def apply(self, variables: dict[str, Any], ids: Array, clip_skip: int = 0) -> TextOutput:
        """Token ids (G, S): the guidance branches of one prompt. `variables` has the features (G, F) of its image."""
        params = variables["params"]
        output: TextOutput = self.text.apply({"params": params["text"]}, ids, clip_skip)
        tokens = self.projection.apply({"params": params["image_proj"]}, params["features"])
        return output._replace(last_hidden_state=join(self.how, output.last_hidden_state, tokens))
