"""The parts of a Stable Diffusion 1.x folder, diffusers' layout in PyTorch or Flax spelling: what lies where."""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ipadapter_jax.errors import InputError, WeightFileError
from ipadapter_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import UNetConfig
from ipadapter_jax.models.vae import VAE, VAEConfig
from ipadapter_jax.ops.fast_params import parameter_shapes
from ipadapter_jax.storage.text_files import read_json_object
from ipadapter_jax.weights import identify, unsupported_families
from ipadapter_jax.weights.component import Component
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.key_mapping import FLAX, VAE_RENAMES, StateDictLayout, torch_layout
from ipadapter_jax.weights.layouts.openclip import to_transformers
from ipadapter_jax.weights.lazy import Tensor
from ipadapter_jax.weights.load_tree import Tree, check_tree, load_tree
from ipadapter_jax.weights.weight_files import choose_weights, is_shard, pick_variants

log = logging.getLogger("ipadapter_jax")


def _old_vae_key(key: str) -> str:
    return re.sub(
        r"(mid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.",
        lambda found: f"{found[1]}.{VAE_RENAMES[found[2]]}.",
        key,
    )


def _old_text_key(key: str) -> str:
    return (
        key
        if key.startswith(("text_model.", "vision_", "visual_", "text_projection", "logit"))
        else f"text_model.{key}"
    )


def like(*shape: int, dtype: Any = jnp.float32) -> Any:
    """An array's shape and dtype, where no array is needed."""
    return jax.ShapeDtypeStruct(shape, dtype)


UNET = Component(
    title="UNet",
    kind=identify.UNET,
    classes=("UNet2DConditionModel",),
    torch_stem="diffusion_pytorch_model",
    flax_stem="diffusion_flax_model",
    config=UNetConfig.from_json,
    module=UNet,
    example=lambda config: functools.partial(
        UNet.from_text,
        latents=like(1, 2**config.levels, 2**config.levels, config.in_channels),
        timesteps=like(1),
        text=like(1, 1, config.cross_attention_dim),
    ),
)
VAE_COMPONENT = Component(
    title="VAE",
    kind=identify.VAE,
    classes=("AutoencoderKL",),
    torch_stem="diffusion_pytorch_model",
    flax_stem="diffusion_flax_model",
    config=VAEConfig.from_json,
    module=VAE,
    example=lambda config: functools.partial(
        VAE.__call__, images=like(1, config.downscale, config.downscale, config.in_channels)
    ),
    renames=VAE_RENAMES,
    modernise=_old_vae_key,
)
TEXT_ENCODER = Component(
    title="text encoder",
    kind=identify.TEXT_ENCODER,
    classes=("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"),
    torch_stem="model",
    flax_stem="flax_model",
    config=CLIPTextConfig.from_json,
    module=CLIPText,
    example=lambda config: functools.partial(CLIPText.__call__, input_ids=like(1, 1, dtype=jnp.int32)),
    modernise=_old_text_key,
    ignored=r".*position_ids|text_projection\..*|logit_scale|vision_model\..*|visual_projection\..*",
)
IMAGE_ENCODER = Component(
    title="image encoder",
    kind=identify.IMAGE_ENCODER,
    classes=("CLIPVisionModelWithProjection", "CLIPVisionModel", "CLIPModel"),
    torch_stem="model",
    flax_stem="flax_model",
    config=CLIPVisionConfig.from_json,
    module=CLIPVision,
    example=lambda config: functools.partial(
        CLIPVision.__call__, pixel_values=like(1, config.image_size, config.image_size, 3)
    ),
    other_files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    translate=to_transformers,
    ignored=r".*position_ids|text_projection\..*|logit_scale|text_model\..*",
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoadedComponent:
    """A network with its weights and the file that they came from."""

    module: Any
    params: Tree
    source: Path


@dataclasses.dataclass(frozen=True, eq=False)
class ComponentConfig:
    """A network to be: the settings in `path`, a config.json, and the configuration that they make."""

    component: Component
    settings: Mapping[str, Any]
    config: Any
    path: Path

    @functools.cached_property
    def template(self) -> Tree:
        """The parameter tree with shapes for leaves. Raises InputError naming the file when no network comes of it."""
        key = self.component.title, self.config
        if key not in _templates:
            network = self.component.module(self.config, np.float32)
            _templates[key] = _explained(self.component, self.path, lambda: template_of(self.component, network))
        return _templates[key]


_templates: dict[Any, Tree] = {}  # tracing a UNet for its shapes takes a second


@dataclasses.dataclass(frozen=True, eq=False)
class LazyComponent:
    """A network whose weights lie ready in `source`: their names and shapes fit, and nothing of them is read yet."""

    blueprint: ComponentConfig
    tensors: Mapping[str, Tensor]
    spelling: StateDictLayout
    source: Path

    @property
    def config(self) -> Any:
        return self.blueprint.config

    def load(self, dtype: np.dtype, put: Callable = jax.device_put) -> LoadedComponent:
        """Reads the weights in `dtype`. Raises WeightFileError naming a tensor that is not finite there."""
        template, source = self.blueprint.template, str(self.source)
        params = load_tree(self.tensors, template, self.spelling, source=source, dtype=dtype, put=put)
        return LoadedComponent(self.blueprint.component.module(self.config, dtype), params, self.source)


def load_component(
    component: Component, folder: Path, dtype: np.dtype, variant: str | None = None, put: Callable = jax.device_put
) -> LoadedComponent:
    """Reads `folder`/config.json and its weights, in `dtype`. Raises InputError or WeightFileError naming the fault."""
    return open_component(component, folder, variant).load(dtype, put)


def open_component(component: Component, folder: Path, variant: str | None = None) -> LazyComponent:
    """Opens `folder`/config.json and its weights. Raises InputError or WeightFileError naming the fault."""
    blueprint = read_component_config(component, folder / "config.json")
    _ = blueprint.template  # what is wrong with the settings is said before the weights
    source = folder / choose_weights(component, [path.name for path in folder.iterdir()], str(folder), variant)
    return open_weights(blueprint, open_tensors(source), source)


def read_component_config(component: Component, path: Path) -> ComponentConfig:
    """From a config.json. Raises InputError naming the file and what is wrong in it."""
    return component_config(component, read_json(path), path)


def component_config(component: Component, settings: Mapping[str, Any], path: Path) -> ComponentConfig:
    """From settings that come from `path`. Raises InputError naming it and what is wrong in them, or of another network
    than this."""
    name = settings.get("_class_name")
    if isinstance(name, str) and name.removeprefix("Flax") not in component.classes:
        wanted = f"{component.kind} ({component.classes[0]})"
        raise InputError(f"{path}: this is {unsupported_families.of_class(name)}; needed is {wanted}")
    return ComponentConfig(component, settings, _explained(component, path, lambda: component.config(settings)), path)


def _explained(component: Component, path: Path, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: no {component.title} can be built from these settings ({reason})") from None


def open_weights(
    blueprint: ComponentConfig, tensors: Mapping[str, Tensor], source: Path, spelling: StateDictLayout | None = None
) -> LazyComponent:
    """The tensors of `source` as this network: in `spelling`, or in Flax's or PyTorch's, whichever theirs is.

    Raises WeightFileError naming what does not fit, and what the file is where that is something else.
    """
    component, found = blueprint.component, identify.identify(tensors)
    tensors = drop_ignored(component.translate(tensors), component.ignored, str(source))
    if spelling is None and any(name.endswith((".kernel", ".scale")) for name in tensors):
        spelling = FLAX
    if spelling is None:
        spelling, tensors = torch_layout(component.renames), _modernised(tensors, component, str(source))
    try:
        check_tree(tensors, blueprint.template, spelling, source=str(source))
    except WeightFileError as error:
        own = {component.kind, identify.UNKNOWN, identify.CHECKPOINT} | (
            {identify.OPENCLIP} if component.other_files else set()
        )
        if found.name in own:
            raise
        raise WeightFileError(f"{error} It looks like {found}: {found.advice}") from None
    return LazyComponent(blueprint, tensors, spelling, source)


def _modernised(tensors: Mapping[str, Tensor], component: Component, source: str) -> dict[str, Tensor]:
    modern: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if modern.setdefault(component.modernise(key), tensor) is not tensor:
            raise WeightFileError(f"{source}: {key} stands there twice, in an old and a new spelling; use another file")
    return modern


def template_of(component: Component, module: Any) -> Tree:
    """The module's parameter tree with shapes for leaves, at no cost."""
    example = component.example(module.config)
    return parameter_shapes(module, method=example.func, **example.keywords)


def drawn_params(component: Component, module: Any, key: jax.Array) -> Tree:
    """First weights of the module, as flax draws them."""
    example = component.example(module.config)
    inputs = {name: jnp.zeros(like.shape, like.dtype) for name, like in example.keywords.items()}
    return jax.jit(lambda key: module.init(key, method=example.func, **inputs))(key)["params"]


def drop_ignored(tensors: Mapping[str, Tensor], pattern: str, source: str) -> dict[str, Tensor]:
    """The tensors whose names do not match, reporting those that do."""
    ignored = dict.fromkeys(name for name in tensors if re.fullmatch(pattern, name))
    report_ignored([*ignored], source)
    return {name: tensor for name, tensor in tensors.items() if name not in ignored}


def report_ignored(names: Sequence[str], source: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log.info("%s: ignored %s%s", source, ", ".join(names[:3]), more)


def choose_files(
    names: Sequence[str], folders: Mapping[str, Component], extras: Sequence[str], variant: str | None
) -> list[str]:
    """Of all files of a repository those that loading needs: configs, `extras`, and per network one weight file or its
    shards, in `variant` where the network has it. Raises InputError when none has it."""
    chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in extras)]
    held: dict[str, list[str]] = {folder: [] for folder in folders}
    for name in names:
        folder, _, last = name.rpartition("/")
        if folder in held:
            held[folder].append(last)
    picked = pick_variants({folder: (folders[folder], held[folder]) for folder in folders}, variant)
    for folder, component in folders.items():
        weights = choose_weights(component, held[folder], folder or ".", picked[folder])
        needed = ["config.json", weights, *(name for name in held[folder] if is_shard(name, weights))]
        chosen += [f"{folder}/{name}" if folder else name for name in needed]
    return chosen


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError naming the file when it is missing or is something else."""
    if not path.exists():
        raise InputError(f"{path} is missing: give a folder in diffusers' layout (unet/, vae/, text_encoder/ ...)")
    return read_json_object(path, "download it again", marked=False)
