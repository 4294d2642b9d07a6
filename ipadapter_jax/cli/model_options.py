"""Options of every command that opens a base model."""

import dataclasses

from ipadapter_jax.storage.paths import PathOrHubId
from ipadapter_jax.weights.model_source import ModelSource


@dataclasses.dataclass(kw_only=True)
class ModelOptions:
    """How to open a base model, and what replaces its parts."""

    config: PathOrHubId | None = None
    """For a single file: a folder or Hub id with the settings and tokenizer of its model family; by default Stable
    Diffusion 1.5."""
    vae: PathOrHubId | None = None
    """VAE to use instead of the base model's: a folder, a Hub id or a file."""
    text_encoder: PathOrHubId | None = None
    """Text encoder to use instead of the base model's: a folder, a Hub id or a file."""
    extract_ema: bool = False
    """For a single file: read the moving average (EMA) of its UNet."""
    variant: str | None = None
    """Variant of the base model's weight files to read, such as fp16 or non_ema; components without such files are read
    from their plain ones."""

    def model_source(self, model: PathOrHubId, revision: str | None = None) -> ModelSource:
        """The base model `model`, opened as these options say."""
        return ModelSource(model, self.variant, revision, self.config, self.vae, self.text_encoder, self.extract_ema)
