"""One network in a folder of diffusers' layout: its settings and weights opened, checked, then read."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from ipadapter_jax.errors import InputError, WeightFileError
from ipadapter_jax.storage.text_files import read_json_object
from ipadapter_jax.weights import identify, unsupported_families
from ipadapter_jax.weights.components import Component, abstract_params
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.ignored_tensors import drop_ignored
from ipadapter_jax.weights.key_mapping import FLAX, StateDictLayout, torch_layout
from ipadapter_jax.weights.lazy import Tensor
from ipadapter_jax.weights.load_tree import CheckedTensors, Tree, check_tree
from ipadapter_jax.weights.weight_files import choose_weights

Built = TypeVar("Built")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoadedComponent:
    """A network with its weights and the file that they came from."""

    module: Any
    params: Tree
    source: Path


@dataclasses.dataclass(frozen=True, eq=False)
class ComponentConfig:
    """The configuration of a network, with the settings in `path`, a config.json, that it was built from."""

    component: Component
    settings: Mapping[str, object]
    config: Any
    path: Path

    @functools.cached_property
    def template(self) -> Tree:
        """The parameter tree with shapes for leaves. Raises InputError naming the file when no network can be built."""
        return _explained(self.component, self.path, lambda: _abstract_params(self.component, self.config))


@functools.lru_cache(maxsize=32)  # tracing a UNet for its shapes takes a second
def _abstract_params(component: Component, config: Any) -> Tree:
    return abstract_params(component, component.module(config, np.float32))


@dataclasses.dataclass(frozen=True, eq=False)
class LazyComponent:
    """A network whose weights in `source` were found to fit it and are not read yet."""

    component_config: ComponentConfig
    weights: CheckedTensors
    source: Path

    @property
    def config(self) -> Any:
        return self.component_config.config

    def load(self, dtype: np.dtype, put: Callable = jax.device_put) -> LoadedComponent:
        """Reads the weights in `dtype`. Raises WeightFileError naming a tensor that is not finite there."""
        module = self.component_config.component.module(self.config, dtype)
        return LoadedComponent(module, self.weights.load(dtype, put), self.source)


def load_component(
    component: Component, folder: Path, dtype: np.dtype, variant: str | None = None, put: Callable = jax.device_put
) -> LoadedComponent:
    """Reads `folder`/config.json and its weights, in `dtype`. Raises InputError or WeightFileError naming the fault."""
    return open_component(component, folder, variant).load(dtype, put)


def open_component(component: Component, folder: Path, variant: str | None = None) -> LazyComponent:
    """Opens `folder`/config.json and its weights. Raises InputError or WeightFileError naming the fault."""
    component_config = read_component_config(component, folder / "config.json")
    _ = component_config.template  # errors in the settings come before errors in the weights
    source = folder / choose_weights(component.files, [path.name for path in folder.iterdir()], str(folder), variant)
    return open_weights(component_config, open_tensors(source), source)


def read_component_config(component: Component, path: Path) -> ComponentConfig:
    """From a config.json. Raises InputError naming the file and what is wrong in it."""
    return build_component_config(component, read_json(path), path)


def build_component_config(component: Component, settings: Mapping[str, object], path: Path) -> ComponentConfig:
    """From the settings in `path`. Raises InputError naming it when they are invalid or of another network."""
    name = settings.get("_class_name")
    if isinstance(name, str) and name.removeprefix("Flax") not in component.files.classes:
        wanted = f"{component.files.kind} ({component.files.classes[0]})"
        raise InputError(f"{path}: this is {unsupported_families.of_class(name)}; give {wanted}")
    return ComponentConfig(component, settings, _explained(component, path, lambda: component.config(settings)), path)


def _explained(component: Component, path: Path, build: Callable[[], Built]) -> Built:
    try:
        return build()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: no {component.files.title} can be built from these settings ({reason})") from None


def open_weights(
    component_config: ComponentConfig,
    tensors: Mapping[str, Tensor],
    source: Path,
    layout: StateDictLayout | None = None,
) -> LazyComponent:
    """The tensors of `source` as this network, in `layout`; without one in Flax's or PyTorch's, as their names tell.

    Raises WeightFileError naming what does not fit, and what the file is if it is something else.
    """
    component, found = component_config.component, identify.identify(tensors)
    tensors = drop_ignored(component.files.translate(tensors), component.files.ignored, str(source))
    if layout is None and any(name.endswith((".kernel", ".scale")) for name in tensors):
        layout = FLAX
    if layout is None:
        layout, tensors = torch_layout(component.files.renames), _modernised(tensors, component, str(source))
    try:
        weights = check_tree(tensors, component_config.template, layout, source=str(source))
    except WeightFileError as error:
        own = {component.files.kind, identify.UNKNOWN, identify.CHECKPOINT} | (
            {identify.OPENCLIP} if component.files.other_files else set()
        )
        if found.name in own:
            raise
        raise WeightFileError(f"{error} It looks like {found}: {found.advice}") from None
    return LazyComponent(component_config, weights, source)


def _modernised(tensors: Mapping[str, Tensor], component: Component, source: str) -> dict[str, Tensor]:
    modern: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if modern.setdefault(component.files.modern_key(key), tensor) is not tensor:
            raise WeightFileError(f"{source}: {key} is present under both its old and its new key; use another file")
    return modern


def read_json(path: Path) -> dict[str, object]:
    """A JSON object. Raises InputError naming the file when it is missing or is something else."""
    if not path.exists():
        raise InputError(f"{path} is missing: give a folder in diffusers' layout (unet/, vae/, text_encoder/ ...)")
    return read_json_object(path, "download it again", marked=False)
