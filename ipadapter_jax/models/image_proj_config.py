"""Sizes of an image projection, and the features that it reads."""

import dataclasses

from ipadapter_jax.models.image_features import FeatureKind

HEAD_DIM = 64  # of the Resampler, in every released file


@dataclasses.dataclass(frozen=True)
class ImageProjConfig:
    """What a projection file says about itself; feature width F, tokens N, token width D."""

    variant: str  # "base", "plus" or "full"
    feature_dim: int  # F of the encoder's features
    cross_attention_dim: int  # D
    num_tokens: int  # N; for "full" every position of the encoder
    hidden_dim: int = 0  # "plus": width of the Resampler
    heads: int = 0  # "plus"
    depth: int = 0  # "plus"
    ff_mult: int = 4  # "plus"

    @property
    def feature_kind(self) -> FeatureKind:
        """What the projection reads of each image."""
        return FeatureKind.IMAGE_EMBEDS if self.variant == "base" else FeatureKind.PENULTIMATE_STATES
