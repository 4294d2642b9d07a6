"""From a published config.json to a network's configuration: what is not supported is an error, never ignored."""

from collections.abc import Mapping
from typing import Any

from ipadapter_jax.errors import InputError


def pick(
    raw: Mapping[str, Any], *, what: str, fields: Mapping[str, Any], fixed: Mapping[str, tuple], ignored: set[str]
) -> dict[str, Any]:
    """The values of `fields` (name -> default) found in `raw`, lists as tuples.

    A name in `fixed` may be present only with one of the values given there; a name in `ignored` does not change the
    network; private names (`_class_name`) neither. Any other name with a value that switches something on raises
    InputError: a network built without it would run and be wrong.
    """
    for name, value in raw.items():
        value = tuple(value) if isinstance(value, list) else value
        if name in fields or name in ignored or name.startswith("_"):
            continue
        if name in fixed:
            if value not in fixed[name]:
                supported = " or ".join(map(repr, fixed[name]))
                raise InputError(f"{what} config: {name}={value!r} is not supported, only {supported}")
        elif value not in (None, False):
            raise InputError(f"{what} config: unknown setting {name}={value!r}; is this a Stable Diffusion 1.x model?")
    found = {name: raw.get(name, default) for name, default in fields.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
