"""A base model that was opened: a folder in diffusers' layout or a checkpoint of one file, with parts replaced."""

import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.errors import InputError, WeightFileError, argument
from ipadapter_jax.models.unet_config import UNetConfig
from ipadapter_jax.weights import bundled
from ipadapter_jax.weights.components import TEXT_ENCODER, UNET, VAE_COMPONENT, Component
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.hub import check_revision, local_path, path_here
from ipadapter_jax.weights.identify import identify
from ipadapter_jax.weights.key_mapping import StateDictLayout
from ipadapter_jax.weights.layouts import single_file
from ipadapter_jax.weights.lazy import Tensor
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
from ipadapter_jax.weights.unsupported_families import unsupported
from ipadapter_jax.weights.weight_files import choose_files, pick_variants

BASE_COMPONENTS = {"unet": UNET, "vae": VAE_COMPONENT, "text_encoder": TEXT_ENCODER}
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # whose settings a single file is read with
_EXTRAS = ("model_index.json", "tokenizer/*", "scheduler/*.json")

Reference = str | os.PathLike


@dataclasses.dataclass(frozen=True, eq=False)
class BaseModel:
    """Configurations and the places of all weights, none of which is read yet.

    `folder` has the settings of every network, the tokenizer and the scheduler; the weights lie there too, of each part
    those of its entry in `variants`, unless `parts` holds the tensors of a single file, or `replaced` names another
    place.
    """

    reference: str
    folder: Path
    variants: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    file: Path | None = None
    parts: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    replaced: Mapping[str, Reference] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / "tokenizer")

    @functools.cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_json(read_json(self.folder / "scheduler" / "scheduler_config.json"))

    @property
    def guidance_scale(self) -> float | None:
        """The model's own where it is not the usual one."""
        return bundled.GUIDANCE_SCALE if self.folder == bundled.FOLDER and self.file is None else None

    def component_config(self, name: str) -> ComponentConfig:
        """The settings of "unet", "vae" or "text_encoder". Raises InputError naming what is wrong with them."""
        if name not in self._component_configs:
            self._component_configs[name] = (
                self.part(name).component_config if name in self.replaced else self.own_component_config(name)
            )
        return self._component_configs[name]

    @functools.cached_property
    def _component_configs(self) -> dict[str, ComponentConfig]:
        return {}

    def own_component_config(self, name: str) -> ComponentConfig:
        found = read_component_config(BASE_COMPONENTS[name], self.folder / name / "config.json")
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
        component = BASE_COMPONENTS[name]
        if name in self.replaced:
            return _replacement(component, name, self.replaced[name], self)
        if self.file is None:
            return open_component(component, self.folder / name, self.variants.get(name))
        if not self.parts[name]:
            raise WeightFileError(
                f"{self.file}: holds no {component.title}; name one with {argument(name)}"
                if name in ("vae", "text_encoder")
                else f"{self.file}: holds no {component.title}; take another file"
            )
        try:
            return self._in_file(name, self.parts[name], self.file)
        except WeightFileError as error:
            if name == "unet":
                raise
            raise WeightFileError(f"{error} A whole {component.title} can be named with {argument(name)}") from None

    def _in_file(self, name: str, tensors: Mapping[str, Tensor], file: Path) -> LazyComponent:
        found = self.component_config(name)
        return open_weights(found, tensors, file, single_file_layout(name, found.config))

    def check(self) -> None:
        """Opens all networks. Raises InputError when the parts do not belong together."""
        self.check_tokenizer()
        _check_fit(self.reference, **{name: self.config(name) for name in BASE_COMPONENTS})
        for name in BASE_COMPONENTS:
            self.part(name)

    def check_tokenizer(self) -> None:
        """Raises InputError when its text encoder does not know every token, and warns when it knows more."""
        check_vocabulary(f"base model {self.reference}", self.tokenizer, self.config("text_encoder").vocab_size)


def open_base(
    reference: Reference,
    *,
    variant: str | None = None,
    revision: str | None = None,
    config: Reference | None = None,
    vae: Reference | None = None,
    text_encoder: Reference | None = None,
    extract_ema: bool = False,
) -> BaseModel:
    """Opens a folder in diffusers' layout, a single file ("LDM": .safetensors or .ckpt), a Hub id, a file on the Hub
    ("owner/name/model.safetensors"), or "mini".

    A single file is read with the settings, tokenizer and scheduler of `config`, a folder or Hub id, by default Stable
    Diffusion 1.5's. `vae` and `text_encoder` replace these parts: a folder, a Hub id or a file. `extract_ema` takes the
    moving average of the UNet in a single file. `variant` ("fp16", "non_ema") picks such files of a folder; parts that
    lack it are read from their plain files, with a warning. Raises InputError naming what is wrong.
    """
    given = {"vae": vae, "text_encoder": text_encoder}
    replaced = {name: place for name, place in given.items() if place is not None}
    needed = {name: component for name, component in BASE_COMPONENTS.items() if name not in replaced}
    extras = (*_EXTRAS, *(f"{name}/config.json" for name in replaced))
    choose = functools.partial(choose_files, folders=needed, extras=extras, variant=variant)
    check_revision(reference, revision, "base model")
    root = local_path(reference, choose, what="base model", revision=revision)
    if root.is_file():
        if variant is not None:
            raise InputError(
                f"{argument('variant')} is for a folder in diffusers' layout; {reference} is a single file"
            )
        return _open_file(reference, root, config, replaced, extract_ema)
    _check_family("base model", reference, root)
    if not (root / "unet").is_dir():
        held = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise InputError(
            f"base model {reference}: no folder in diffusers' layout (it has no unet/config.json but {held}); "
            "give such a folder, or one checkpoint file"
        )
    for name, value in (("config", config), ("extract_ema", extract_ema)):
        if value:
            raise InputError(f"{argument(name)} is for a checkpoint of one file; {reference} is a folder")
    return BaseModel(str(reference), root, _variants(reference, root, needed, variant), replaced=replaced)


def _check_family(what: str, reference: Reference, root: Path) -> None:
    if family := unsupported(root):
        raise InputError(f"{what} {reference}: {family}, which is not supported here yet; give one of SD 1.x")


def _variants(
    reference: Reference, root: Path, needed: Mapping[str, Component], variant: str | None
) -> dict[str, str | None]:
    """In which variant each part of a folder is read; says which parts lack the one that was asked for."""
    held = {name: [path.name for path in (root / name).glob("*")] for name in needed}
    try:
        found = pick_variants({name: (component, held[name]) for name, component in needed.items()}, variant)
    except InputError as error:
        raise InputError(f"base model {reference}: {error}") from None
    plain = [needed[name].title for name, picked in found.items() if picked is None]
    if variant is not None and plain:
        warnings.warn(
            f"base model {reference}: the variant {variant!r} is read where there is one; {' and '.join(plain)} "
            f"{'has' if len(plain) == 1 else 'have'} none, so the plain weights are read",
            stacklevel=2,  # this file, whoever calls: one place warns once
        )
    return found


def open_base_folder(reference: Reference, variant: str | None) -> BaseModel:
    """The same for whoever reads the folder again and again, such as training. Raises InputError for a single file."""
    here = path_here(reference, "base model")
    if here is not None and here.is_file():
        _open_checkpoint(here)
        raise InputError(
            f"base model {reference}: a single file; make a folder of it first, `ipadapter-jax convert {reference} "
            f"{here.name.partition('.')[0]}`, and give that"
        )
    return open_base(reference, variant=variant)


def _open_file(
    reference: Reference, file: Path, config: Reference | None, replaced: Mapping[str, Reference], extract_ema: bool
) -> BaseModel:
    parts = single_file.split(str(file), _open_checkpoint(file), extract_ema=extract_ema)
    return BaseModel(str(reference), _settings_folder(file, config), file=file, parts=parts, replaced=replaced)


def _open_checkpoint(file: Path) -> dict[str, Tensor]:
    """The tensors of a single file. Raises WeightFileError saying what it is when it is something else."""
    tensors = open_tensors(file)
    if not single_file.is_single_file(tensors):
        kind = identify(tensors)
        raise WeightFileError(f"base model {file}: this is {kind}, not a base model; {kind.advice}")
    return tensors


def _settings_folder(file: Path, config: Reference | None) -> Path:
    def choose(names: Sequence[str]) -> Sequence[str]:
        return [name for name in names if name.endswith(("/config.json", "_config.json")) or name.startswith("token")]

    try:
        folder = local_path(config or STABLE_DIFFUSION, choose, what="config")
    except InputError as error:
        if config is not None:
            raise
        raise InputError(
            f"base model {file}: a single file has no tokenizer and no settings; name a folder or Hub id of the same "
            f"family with {argument('config')} ({error})"
        ) from None
    _check_family("config", config or STABLE_DIFFUSION, folder)
    if not (folder / "unet" / "config.json").is_file():
        given = config or STABLE_DIFFUSION
        raise InputError(f"config {given}: no folder in diffusers' layout (it has no unet/config.json)")
    return folder


def single_file_layout(name: str, config: Any) -> StateDictLayout | None:
    """How the single file spells a network; None where that is PyTorch's own."""
    makers: Mapping[str, Callable[[Any], StateDictLayout]] = {
        "unet": single_file.unet_layout,
        "vae": single_file.vae_layout,
    }
    return makers[name](config) if name in makers else None


def _replacement(component: Component, name: str, reference: Reference, base: BaseModel) -> LazyComponent:
    """A part from another place: its own folder, a base model's, or a file of either layout."""

    def choose(names: Sequence[str]) -> Sequence[str]:
        inside = name if any(file.startswith(f"{name}/") for file in names) else ""
        return choose_files(names, {inside: component}, (), None)

    place = local_path(reference, choose, what=component.title)
    if place.is_dir():
        return open_component(component, place / name if (place / name).is_dir() else place)
    own, tensors = base.own_component_config(name), open_tensors(place)
    bare = name == "vae" and any(re.match(r"(vae\.)?(encoder\.down|decoder\.up)\.", key) for key in tensors)
    if not bare and not single_file.is_single_file(tensors):
        return open_weights(own, tensors, place)
    if bare:  # a VAE alone, as its own training leaves it
        prefix = single_file.PREFIXES[name]
        tensors = {prefix + key.removeprefix("vae."): tensor for key, tensor in tensors.items()}
    tensors = single_file.split(str(place), tensors)[name]
    if not tensors:
        raise WeightFileError(f"{place}: holds no {component.title}; name another place")
    return open_weights(own, tensors, place, single_file_layout(name, own.config))


def _check_fit(reference: str, unet: UNetConfig, vae: Any, text_encoder: Any) -> None:
    latents = vae.latent_channels
    if unet.out_channels != latents or unet.in_channels not in (latents, 2 * latents + 1):
        raise InputError(
            f"base model {reference}: its UNet reads {unet.in_channels} channels and gives {unet.out_channels}, the "
            f"VAE has {latents}; models that follow instructions (8 channels) are not supported"
        )
    if text_encoder.hidden_size != unet.cross_attention_dim:
        raise InputError(
            f"base model {reference}: its text encoder gives width {text_encoder.hidden_size}, its UNet reads "
            f"{unet.cross_attention_dim}; take both from one model, or name another with {argument('text_encoder')}"
        )


def check_text_to_image(reference: str, unet: UNetConfig) -> None:
    """Raises InputError for a UNet that reads more than the noisy latents."""
    if unet.in_channels != unet.out_channels:
        raise InputError(
            f"base model {reference}: an inpainting model ({unet.in_channels} channels), which needs an image and a "
            f"mask: give {argument('image')} and {argument('mask_image')}, or take the ordinary model of 4 channels"
        )
