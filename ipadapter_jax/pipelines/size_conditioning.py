"""The sizes that SDXL is conditioned on ("micro-conditioning", arXiv 2307.01952, section 2.2)."""

import dataclasses
from collections.abc import Sequence
from numbers import Integral

import numpy as np

from ipadapter_jax.errors import InputError, argument

GivenSize = Sequence[int]
"""Height and width, or top and left, in pixels."""

_LARGEST = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeConditioning:
    """Sizes as a caller gives them, in diffusers' words; None stands for the size of the generated image."""

    original_size: GivenSize | None = None
    crops_coords_top_left: GivenSize = (0, 0)
    target_size: GivenSize | None = None
    negative_original_size: GivenSize | None = None
    negative_crops_coords_top_left: GivenSize = (0, 0)
    negative_target_size: GivenSize | None = None

    @property
    def given(self) -> list[str]:
        """The names of what differs from the default."""
        fields = dataclasses.fields(self)
        return [field.name for field in fields if getattr(self, field.name) not in (field.default, [0, 0])]

    @property
    def given_of_negative(self) -> list[str]:
        """Those of the unconditional branch."""
        return [name for name in self.given if name.startswith("negative_")]

    def time_ids(self, height: int, width: int, *, guided: bool, from_image: bool) -> np.ndarray:
        """(G, 6) float32 for an image of this size: original height and width, top and left of the crop, target height
        and width; of the unconditional branch first where there is one.

        As in diffusers, the unconditional branch has numbers of its own only where both of its sizes are given; where
        generation starts `from_image` each of its sizes counts alone, and its crop does not. Raises InputError naming
        what is not a pair of sizes.
        """
        self._check_effect(from_image)
        own = height, width
        original, target = self._pair("original_size") or own, self._pair("target_size") or own
        crop = self._pair("crops_coords_top_left") or (0, 0)
        positive = (*original, *crop, *target)
        of_negative = self._pair("negative_original_size"), self._pair("negative_target_size")
        negative_crop = self._pair("negative_crops_coords_top_left") or (0, 0)
        if from_image:
            negative = (*(of_negative[0] or original), *crop, *(of_negative[1] or target))
        elif None in of_negative:
            negative = positive
        else:
            negative = (*(of_negative[0] or ()), *negative_crop, *(of_negative[1] or ()))
        return np.asarray([negative, positive] if guided else [positive], np.float32)

    def _check_effect(self, from_image: bool) -> None:
        """Raises InputError for a number of the unconditional branch that would not be used."""
        given, crop = self.given_of_negative, "negative_crops_coords_top_left"
        if from_image and crop in given:
            raise InputError(f"{argument(crop)} has no effect where generation starts from an image; leave it out")
        if not from_image and given and None in (self.negative_original_size, self.negative_target_size):
            both = f"{argument('negative_original_size')} and {argument('negative_target_size')}"
            raise InputError(f"{argument(given[0])} has no effect without both {both}; give them, or leave it out")

    def _pair(self, name: str) -> tuple[int, int] | None:
        value = getattr(self, name)
        if value is None:
            return None
        numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        numbers = [int(number) if isinstance(number, Integral) else -1 for number in numbers]
        if len(numbers) != 2 or not all(0 <= number <= _LARGEST for number in numbers):
            raise InputError(f"{argument(name, value)} must be two whole numbers of pixels, such as (1024, 1024)")
        return numbers[0], numbers[1]
