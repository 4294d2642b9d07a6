"""Builds our configuration dataclasses from published JSON: a setting that is not supported is an error."""

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import TypeVar

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.strings import short_repr

Config = TypeVar("Config")
Value = TypeVar("Value")

# Far beyond any model: tracing takes time for every layer and memory for every channel.
_MAX_INTEGER = 1 << 20  # a width, a vocabulary, a number of timesteps
_MAX_LENGTH = 100  # of a list of integers
_MAX_LAYERS: Mapping[str, int] = {"layers_per_block": 16, "num_hidden_layers": 200}


def added_setting(default: Value) -> Value:
    """A field of a configuration that earlier releases did not have, and that meant `default` there. `settings_text`
    leaves it out at its default."""
    return dataclasses.field(default=default, metadata={_ADDED: True})


_ADDED = "added"


def settings_text(config: object) -> str:
    """The settings of a configuration as text, which identifies them in files: the same as in earlier releases for the
    models that those supported."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return repr(config)
    shown = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if not (field.metadata.get(_ADDED) and getattr(config, field.name) == field.default)
    ]
    return f"{type(config).__qualname__}({', '.join(shown)})"


def build_config(cls: type[Config], values: Mapping[str, object], what: str) -> Config:
    """cls(**values) with lists as tuples, after checking every value against its field's annotation.

    Integers must be neither negative nor larger than those of any model, and floats must be finite.
    Raises InputError naming `what` and the setting.
    """
    hints = typing.get_type_hints(cls)
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in found.items():
        if not _fits(value, hints[name]):
            kind = getattr(hints[name], "__name__", str(hints[name]))
            raise InputError(f"{what} config: {name}={short_repr(value)} is not usable, it must be of type {kind}")
        numbers = [item for item in (value if isinstance(value, tuple) else [value]) if type(item) is int]
        if max(numbers, default=0) > _MAX_LAYERS.get(name, _MAX_INTEGER) or len(numbers) > _MAX_LENGTH:
            raise InputError(f"{what} config: {name}={short_repr(value)} is not usable, it is larger than in any model")
        if name.endswith("_eps") and not (isinstance(value, float) and 0 < value < 1):
            raise InputError(f"{what} config: {name}={value} is not usable, it must lie between 0 and 1")
    return cls(**found)


def _fits(value: object, hint: object) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(hint, type) and isinstance(value, hint)


def select_fields(
    cls: type, raw: Mapping[str, object], *, what: str, fixed: Mapping[str, tuple], ignored: set[str]
) -> dict[str, object]:
    """The settings in `raw` that are fields of the dataclass `cls`.

    fixed: settings that may be present only with one of the values given here.
    ignored: settings that do not change the network; names such as `_class_name` are ignored as well.
    Raises InputError for any other setting that switches something on: without it the network would compute something
    else.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    for name, value in raw.items():
        if name in fields or name in ignored or name.startswith("_"):
            continue
        value = tuple(value) if isinstance(value, list) else value
        if name in fixed:
            if value not in fixed[name]:
                supported = " or ".join(map(repr, fixed[name]))
                raise InputError(f"{what} config: {name}={value!r} is not supported, only {supported}")
        elif any(item is not None and item is not False for item in (value if isinstance(value, tuple) else [value])):
            raise InputError(f"{what} config: unknown setting {name}={value!r}; is this a Stable Diffusion 1.x model?")
    return {name: raw[name] for name in fields if name in raw}
