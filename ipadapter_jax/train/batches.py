"""What a training step takes next to its state: a batch of images or of precomputed features, and the frozen models.

Fields are in alphabetical order, which is the order of a program's arguments: compiled programs stay valid.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jax import Array

from ipadapter_jax.runtime.trees import PyTree
from ipadapter_jax.weights.load_tree import Tree


class ImageBatch(NamedTuple):
    """Images that the step encodes itself."""

    clip_pixels: Array | None  # (B, S, S, 3) uint8, of the image prompts; None where a run has none
    input_ids: Array  # (B, 77) int32
    pixels: Array  # (B, H, W, 3) uint8


class EncodedBatch(NamedTuple):
    """Precomputed latents and features, in the dtype that they were computed in."""

    features: Array | None  # (B, F), or with patches (B, L, F); None where a run has no image prompts
    input_ids: Array  # (B, 77) int32
    logvar: Array  # (B, h, w, 4), of the latents' posterior, unscaled
    mean: Array  # (B, h, w, 4)


TrainBatch = ImageBatch | EncodedBatch


def batch_of(arrays: Mapping[str, PyTree]) -> TrainBatch:
    """Arrays, or their shapes, by the names that data sets give them."""
    if "mean" in arrays:
        return EncodedBatch(arrays.get("features"), arrays["input_ids"], arrays["logvar"], arrays["mean"])
    return ImageBatch(arrays.get("clip_pixels"), arrays["input_ids"], arrays["pixels"])


class FrozenModels(NamedTuple):
    """The weights of all parts that are not trained, and what is computed from them once."""

    empty_ids: Array  # (77,) int32, the tokens of the empty text
    params: dict[str, Tree]  # by part: "unet", "vae", "text_encoder", "image_encoder", "image_proj", "ip_adapter"
    zero_features: Array | None = None  # (L, F), precomputed patches of a zero image

    def by_name(self) -> dict[str, PyTree]:
        """All of it under the names that checkpoints record."""
        found: dict[str, PyTree] = {**self.params, "empty_ids": self.empty_ids}
        return found if self.zero_features is None else {**found, "zero_features": self.zero_features}
