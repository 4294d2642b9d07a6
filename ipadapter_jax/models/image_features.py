"""What an image projection reads of an image: the kinds of features, and where CLIP's vision model has them."""

import enum

from jax import Array

from ipadapter_jax.models.clip import VisionOutput


class FeatureKind(enum.Enum):
    """What an adapter's projection reads of each image."""

    IMAGE_EMBEDS = "image_embeds"  # (F,): the projected embedding
    PENULTIMATE_STATES = "penultimate_states"  # (L, F): the states of all positions before the last layer

    @property
    def has_positions(self) -> bool:
        """Whether the features have an axis of positions."""
        return self is not FeatureKind.IMAGE_EMBEDS


def clip_features(output: VisionOutput, kind: FeatureKind) -> Array:
    """The features of this kind, (n, F) or (n, L, F), in the output of CLIP's vision model."""
    return output.hidden_states[-2] if kind is FeatureKind.PENULTIMATE_STATES else output.image_embeds
