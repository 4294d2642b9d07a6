"""Names that settings had in older releases, declared next to the field: `model: Annotated[str, FormerName("base")]`.

Command lines, recipes and the settings recorded in folders go on to be read under these names. Who reads one that a
person wrote warns of it with `warn_of_former_name`.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Annotated, TypeVar, get_args, get_origin, get_type_hints

from ipadapter_jax.errors import InputError

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class FormerName:
    """Mark of a dataclass's field: the name that the field had."""

    name: str


@dataclasses.dataclass(frozen=True)
class FormerValue:
    """Mark of a field with choices: how one of its values was spelled."""

    former: str
    value: str


def former_names(kind: type) -> Mapping[str, str]:
    """{former name: name} of the fields of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    marks = {name: get_args(hint)[1:] for name, hint in hints.items() if get_origin(hint) is Annotated}
    return {mark.name: name for name, found in marks.items() for mark in found if isinstance(mark, FormerName)}


def warn_of_former_name(former: str, name: str, stacklevel: int = 2) -> None:
    """Warns that a person has written `former`, which is called `name` today."""
    warnings.warn(f"{former} is now called {name}", FutureWarning, stacklevel=stacklevel + 1)


def accepts_former_names(kind: type[Settings]) -> type[Settings]:
    """Decorator of a dataclass: its constructor, and `dataclasses.replace`, take the former names of its fields too,
    with a warning. Raises InputError when a field is given under both names."""
    renamed = former_names(kind)
    create = kind.__init__

    @functools.wraps(create)
    def __init__(self: Settings, *args: object, **kwargs: object) -> None:
        # `replace` passes the values of all fields, so that the old value stands there under the new name.
        is_replace = {field.name for field in dataclasses.fields(self)} <= {*kwargs}  # type: ignore[arg-type]
        for former in [name for name in kwargs if name in renamed]:
            name = renamed[former]
            if name in kwargs and not is_replace:
                raise InputError(f"{former} and {name} are the same setting; give {name} alone")
            kwargs[name] = kwargs.pop(former)
            warn_of_former_name(former, name)
        create(self, *args, **kwargs)

    kind.__init__ = __init__
    return kind
