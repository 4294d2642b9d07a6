"""What the UNet looked at: its attention to the tokens of image prompts, as heat over the image."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.models.unet_config import CrossAttentionLayer


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMaps:
    """softmax(q k'^T / sqrt(d)) of the conditional branch, the mean over the heads, before any scale or mask.

    maps[entry][site] is (steps, B, L, N): for every query of a site (L of `grids[site]`, row by row) the attention to
    each of N image tokens, which adds up to 1. An entry is an adapter, or with masks one of its images. `timesteps`
    are those of the steps, `sites` in file order.
    """

    maps: Sequence[Sequence[np.ndarray]]
    sites: Sequence[CrossAttentionLayer]
    grids: Sequence[tuple[int, int]]
    timesteps: np.ndarray
    count: int

    def heat(
        self,
        size: tuple[int, int],
        *,
        image: int = 0,
        entry: int = 0,
        steps: slice = slice(None),
        sites: Sequence[int] | None = None,
    ) -> np.ndarray:
        """The mean over steps and sites for one image, (N, height, width) of `size`: where each token is seen.

        Raises InputError for an image, entry or site that is not there, and where no step or site is chosen.
        """
        known = range(len(self.sites))
        chosen = known if sites is None else sites
        if (
            not 0 <= image < self.count
            or not 0 <= entry < len(self.maps)
            or not (set(chosen) and set(chosen) <= set(known))
            or not len(self.timesteps[steps])
        ):
            raise InputError(
                f"attention maps: there are {len(self.timesteps)} steps, {self.count} images, {len(self.maps)} "
                f"entries, {len(self.sites)} sites; choose among them"
            )
        height, width = size
        total = np.zeros(())  # a running sum: full adapters have 257 tokens
        for site in chosen:
            seen = self.maps[entry][site][steps, image].mean(axis=0)  # (L, N)
            rows = seen.T.reshape(-1, *self.grids[site])
            enlarged = [Image.fromarray(token).resize((width, height), Image.Resampling.BILINEAR) for token in rows]
            total = total + np.stack([np.asarray(token) for token in enlarged])
        return total / len(chosen)
