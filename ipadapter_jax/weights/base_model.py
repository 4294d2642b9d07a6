"""A base model that was opened: its parts, whether from a folder or a single file, and whether they fit together."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError, WeightFileError, argument
from ipadapter_jax.models.clip_config import CLIPTextConfig
from ipadapter_jax.models.families import Family
from ipadapter_jax.models.text_encoders import skippable_layers
from ipadapter_jax.models.unet_config import UNetConfig
from ipadapter_jax.models.vae import VAEConfig
from ipadapter_jax.weights import bundled
from ipadapter_jax.weights.components import TEXT_ENCODER, TEXT_ENCODER_WITH_PROJECTION, UNET, VAE_COMPONENT, Component
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.hub import local_path
from ipadapter_jax.weights.layouts import single_file
from ipadapter_jax.weights.lazy import Tensor
from ipadapter_jax.weights.model_source import ModelSource, StrPath
from ipadapter_jax.weights.open_component import (
    ComponentConfig,
    LazyComponent,
    build_component_config,
    open_component,
    open_weights,
    read_component_config,
    read_json,
)
from ipadapter_jax.weights.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from ipadapter_jax.weights.weight_files import choose_files


def components_of(family: Family) -> dict[str, Component]:
    """The networks of its base models, by part."""
    encoders = {
        role.part: TEXT_ENCODER_WITH_PROJECTION if role.pooled else TEXT_ENCODER for role in family.text_encoders
    }
    return {"unet": UNET, "vae": VAE_COMPONENT} | encoders


@dataclasses.dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model whose settings can be read and whose weights are found, but not read yet.

    `folder` holds the settings of every network, the tokenizer and the scheduler. The weights of a part come from the
    place in `source.replacements` that replaces it; else from `parts`, the tensors of the single file `file`; else from
    `folder`, in the variant that `variants` names for the part.
    """

    source: ModelSource
    folder: Path
    family: Family
    variants: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    file: Path | None = None
    parts: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)

    @property
    def components(self) -> dict[str, Component]:
        """Its networks, by part."""
        return components_of(self.family)

    @functools.cached_property
    def tokenizers(self) -> Mapping[str, Tokenizer]:
        """That of every text encoder, by its part."""
        return {files.part: load_tokenizer(self.folder / files.tokenizer) for files in self.family.text_encoders}

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the first text encoder."""
        return next(iter(self.tokenizers.values()))

    @property
    def text_layers(self) -> int:
        """How many layers a prompt can leave out at most, plus one."""
        return skippable_layers((role, self.config(role.part)) for role in self.family.text_encoders)

    @functools.cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_json(read_json(self.folder / "scheduler" / "scheduler_config.json"))

    @property
    def zeros_for_no_negative(self) -> bool:
        """Whether no negative prompt means zeros in place of text states: so SDXL was trained (the setting
        `force_zeros_for_empty_prompt` of its model_index.json)."""
        file = self.folder / "model_index.json"
        settings = read_json(file) if file.exists() else {}
        pooled = any(role.pooled for role in self.family.text_encoders)
        return pooled and settings.get("force_zeros_for_empty_prompt", True) is True

    @property
    def guidance_scale(self) -> float | None:
        """The model's own default, or None for the usual one."""
        return bundled.GUIDANCE_SCALE if self.folder == bundled.FOLDER and self.file is None else None

    def component_config(self, name: str) -> ComponentConfig:
        """The settings of a part, such as "unet". Raises InputError naming what is wrong with them."""
        if name in self.source.replacements:
            return self.part(name).component_config
        return self.own_component_config(name)

    def own_component_config(self, name: str) -> ComponentConfig:
        """The settings in the model's own folder, whether or not the part is replaced. Raises InputError likewise."""
        if name not in self._own_configs:
            self._own_configs[name] = self._read_config(name)
        return self._own_configs[name]

    @functools.cached_property
    def _own_configs(self) -> dict[str, ComponentConfig]:
        return {}

    def _read_config(self, name: str) -> ComponentConfig:
        found = read_component_config(self.components[name], self.folder / name / "config.json")
        if name == "unet" and self.file is not None:
            channels = single_file.input_channels(self.parts["unet"]) or found.config.in_channels
            found = build_component_config(UNET, {**found.settings, "in_channels": channels}, found.path)
        return found

    def config(self, name: str) -> Any:
        return self.component_config(name).config

    def part(self, name: str) -> LazyComponent:
        """A network, opened once. Raises InputError or WeightFileError naming what does not fit."""
        if name not in self._opened:
            self._opened[name] = self._open(name)
        return self._opened[name]

    @functools.cached_property
    def _opened(self) -> dict[str, LazyComponent]:
        return {}

    def _open(self, name: str) -> LazyComponent:
        component = self.components[name]
        if name in self.source.replacements:
            return _open_replacement(name, self.source.replacements[name], self)
        if self.file is None:
            return open_component(component, self.folder / name, self.variants.get(name))
        if not self.parts[name]:
            raise WeightFileError(
                f"{self.file}: holds no {component.files.title}; name one with {argument(name)}"
                if name in ("vae", "text_encoder")
                else f"{self.file}: holds no {component.files.title}; take another file"
            )
        try:
            return _open_in_file(self.component_config(name), self.parts[name], self.file)
        except WeightFileError as error:
            if name == "unet":
                raise
            raise WeightFileError(
                f"{error} A whole {component.files.title} can be named with {argument(name)}"
            ) from None

    def check(self) -> None:
        """Opens all networks. Raises InputError when they do not fit together."""
        self.check_tokenizer()
        texts = {role.part: self.config(role.part) for role in self.family.text_encoders}
        _check_fit(self.source.model, self.config("unet"), self.config("vae"), texts)
        _check_pooled(self.source.model, self.config("unet"), self.family, texts)
        for name in self.components:
            self.part(name)

    def check_tokenizer(self) -> None:
        """Raises InputError when a text encoder lacks embeddings for some tokens, and warns when it has more."""
        for part, tokenizer in self.tokenizers.items():
            check_vocabulary(f"base model {self.source.model}", tokenizer, self.config(part).vocab_size)


def _open_in_file(config: ComponentConfig, tensors: Mapping[str, Tensor], file: Path) -> LazyComponent:
    return open_weights(config, tensors, file, single_file.layout_of(config.config))


def _open_replacement(name: str, place: StrPath, base: BaseModel) -> LazyComponent:
    """A part from another place: its own folder, the folder of a base model, or a file in either layout."""
    component = base.components[name]

    def choose(names: Sequence[str]) -> Sequence[str]:
        inside = name if any(file.startswith(f"{name}/") for file in names) else ""
        return choose_files(names, {inside: component.files}, (), None)

    path = local_path(place, choose, what=component.files.title)
    if path.is_dir():
        return open_component(component, path / name if (path / name).is_dir() else path)
    own, tensors = base.own_component_config(name), open_tensors(path)
    bare = name == "vae" and any(re.match(r"(vae\.)?(encoder\.down|decoder\.up)\.", key) for key in tensors)
    if not bare and not single_file.is_single_file(tensors):
        return open_weights(own, tensors, path)
    if bare:  # a VAE alone, as its training code saves it
        tensors = {single_file.VAE_PREFIX + key.removeprefix("vae."): tensor for key, tensor in tensors.items()}
    tensors = single_file.split(str(path), tensors, base.family)[name]
    if not tensors:
        raise WeightFileError(f"{path}: holds no {component.files.title}; name another place")
    return _open_in_file(own, tensors, path)


def _check_fit(model: StrPath, unet: UNetConfig, vae: VAEConfig, texts: Mapping[str, CLIPTextConfig]) -> None:
    latents = vae.latent_channels
    if unet.out_channels != latents or unet.in_channels not in (latents, 2 * latents + 1):
        raise InputError(
            f"base model {model}: its UNet reads {unet.in_channels} channels and gives {unet.out_channels}, the "
            f"VAE has {latents}; models that follow instructions (8 channels) are not supported"
        )
    width = sum(text.hidden_size for text in texts.values())
    if width != unet.cross_attention_dim:
        give = "text encoder gives" if len(texts) == 1 else "text encoders together give"
        raise InputError(
            f"base model {model}: its {give} width {width}, its UNet reads {unet.cross_attention_dim}; take both from "
            f"one model, or name another with {argument('text_encoder')}"
        )


def _check_pooled(model: StrPath, unet: UNetConfig, family: Family, texts: Mapping[str, CLIPTextConfig]) -> None:
    for role in family.text_encoders:
        if role.pooled and texts[role.part].projection_dim != unet.pooled_dim:
            raise InputError(
                f"base model {model}: its {role.part} projects to {texts[role.part].projection_dim} numbers, its UNet "
                f"reads {unet.pooled_dim}; take both from one model"
            )


def check_one_text_encoder(what: str, model: StrPath, family: Family) -> None:
    """Raises InputError for a model of several text encoders, for jobs that know one."""
    if len(family.text_encoders) > 1:
        raise InputError(
            f"{what} {model}: {family.title} has {len(family.text_encoders)} text encoders; it can be sampled from but "
            "not yet trained on or converted: give one of SD 1.x or SD 2.x"
        )


def check_text_to_image(model: StrPath, unet: UNetConfig) -> None:
    """Raises InputError for a UNet that reads more than the noisy latents."""
    if unet.in_channels != unet.out_channels:
        raise InputError(
            f"base model {model}: an inpainting model ({unet.in_channels} channels), which needs an image and a "
            f"mask: give {argument('image')} and {argument('mask_image')}, or take the ordinary model of 4 channels"
        )
