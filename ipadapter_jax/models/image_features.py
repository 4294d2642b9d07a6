"""The kinds of features that an image projection reads of an image."""

import enum


class FeatureKind(enum.Enum):
    """What an adapter's projection reads of each image."""

    IMAGE_EMBEDS = "image_embeds"  # (F,): the projected embedding
    PENULTIMATE_STATES = "penultimate_states"  # (L, F): the states of all positions before the last layer

    @property
    def has_positions(self) -> bool:
        """Whether the features have an axis of positions."""
        return self is not FeatureKind.IMAGE_EMBEDS
