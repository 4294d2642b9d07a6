"""Which base model to open, and what replaces its parts."""

import dataclasses
import os

StrPath = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A base model and the options that say how to open it.

    model           a folder in diffusers' layout, a single file ("LDM": .safetensors or .ckpt), a Hub id, a file on
                    the Hub ("owner/name/model.safetensors"), or "mini"
    variant         which weight files of a folder to read, such as "fp16" or "non_ema"; parts that lack it are read
                    from their plain files, with a warning
    revision        branch, tag or commit on the Hub
    config          for a single file: the folder or Hub id with its settings, tokenizer and scheduler; by default
                    Stable Diffusion 1.5's
    vae             a VAE that replaces the model's own: a folder, a Hub id or a file
    text_encoder    a text encoder that replaces the model's own, likewise
    extract_ema     for a single file: read the moving average of its UNet
    """

    model: StrPath
    variant: str | None = None
    revision: str | None = None
    config: StrPath | None = None
    vae: StrPath | None = None
    text_encoder: StrPath | None = None
    extract_ema: bool = False

    @property
    def replacements(self) -> dict[str, StrPath]:
        """Where the parts of the model lie that replace its own, by name."""
        given = {"vae": self.vae, "text_encoder": self.text_encoder}
        return {name: place for name, place in given.items() if place is not None}

    def options(self) -> dict[str, StrPath | bool | None]:
        """Everything but the model, by name."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "model"]
        return {name: getattr(self, name) for name in names}


def model_source(source: ModelSource | StrPath) -> ModelSource:
    """The source itself, or the one of a path or Hub id alone."""
    return source if isinstance(source, ModelSource) else ModelSource(source)
