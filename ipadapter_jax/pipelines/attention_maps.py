"""Attention maps: the UNet's cross-attention to the tokens of image prompts, and heatmaps of it over the image."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.models.unet_config import CrossAttentionLayer


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMaps:
    """softmax(q k'^T / sqrt(d)) of the conditional branch, averaged over the heads, before any scale or mask.

    maps[branch][layer] is (steps, B, L, N): for each of the L queries of a layer, which lie row by row on a grid of
    `grids[layer]`, the attention to each of N image tokens, which sums to 1. An image branch is an adapter, or with
    masks one of its images. `timesteps` are those of the steps; `layers` are the cross-attention layers in file order.
    """

    maps: Sequence[Sequence[np.ndarray]]
    layers: Sequence[CrossAttentionLayer]
    grids: Sequence[tuple[int, int]]
    timesteps: np.ndarray
    count: int

    def heat(
        self,
        size: tuple[int, int],
        *,
        image: int = 0,
        branch: int = 0,
        steps: slice = slice(None),
        layers: Sequence[int] | None = None,
    ) -> np.ndarray:
        """The mean over steps and layers for one image, (N, height, width) of `size`: where each token is attended to.

        Raises InputError for an image, branch or layer that does not exist, and where no step or layer is chosen.
        """
        known = range(len(self.layers))
        chosen = known if layers is None else layers
        if (
            not 0 <= image < self.count
            or not 0 <= branch < len(self.maps)
            or not (set(chosen) and set(chosen) <= set(known))
            or not len(self.timesteps[steps])
        ):
            raise InputError(
                f"attention maps: there are {len(self.timesteps)} steps, {self.count} images, {len(self.maps)} "
                f"image branches, {len(self.layers)} layers; choose among them"
            )
        height, width = size
        total = np.zeros(())  # a running sum: full adapters have 257 tokens
        for layer in chosen:
            attention = self.maps[branch][layer][steps, image].mean(axis=0)  # (L, N)
            by_token = attention.T.reshape(-1, *self.grids[layer])
            enlarged = [Image.fromarray(token).resize((width, height), Image.Resampling.BILINEAR) for token in by_token]
            total = total + np.stack([np.asarray(token) for token in enlarged])
        return total / len(chosen)
