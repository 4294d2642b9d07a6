"""Reads the options of a command from its dataclass. A field is an option, the text below it is its help, and its type
says which values it takes. A field that holds a dataclass is a group of options, whose names begin with the field's."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import (
    Annotated,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from ipadapter_jax.inputs.former_names import FormerName, FormerValue
from ipadapter_jax.storage.paths import PATH_OR_HUB_ID

_POSITIONAL = "positional"
T = TypeVar("T")
Positional = Annotated[T, _POSITIONAL]  # a positional argument


class OptionsOfCommand(Protocol):
    """An instance of a command's dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]


OptionValue = bool | int | float | str | Path | None | tuple[int | float | str | Path, ...]
"""The value of an option; several values are a tuple."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command.

    path: the names of the fields that lead to it from the command's dataclass. about: its help. kind: the type of one
    value; bool takes no value. choices: the allowed values, empty if all values of the kind are. count: the number of
    values, None for one or more. optional: whether it may be None. is_place: whether it names a file or folder.
    default: None also if it is required. former_path: the path with the field's former name, if it had one.
    former_values: {former spelling: choice}.
    """

    path: tuple[str, ...]
    about: str
    kind: type
    choices: tuple[str, ...] = ()
    count: int | None = 1
    optional: bool = False
    is_place: bool = False
    positional: bool = False
    required: bool = False
    default: object = None
    former_path: tuple[str, ...] | None = None
    former_values: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """--optim.learning-rate, or SOURCE for a positional argument."""
        return self.path[-1].upper() if self.positional else _written(self.path)

    @property
    def opposite(self) -> str:
        """--log.no-tensorboard, which sets a bool to False."""
        return _opposite(self.path)

    def former_names(self) -> Iterator["FormerOption"]:
        """What older releases called the option, and its opposite."""
        if self.former_path is not None:
            yield FormerOption(_written(self.former_path), self.name)
            if self.kind is bool:
                yield FormerOption(_opposite(self.former_path), self.opposite)

    @property
    def metavar(self) -> str:
        """The placeholder of its values in the help."""
        if self.positional:
            return self.name
        if self.kind is bool:
            return ""
        names = {int: "N", float: "X", Path: "PATH", str: "PATH" if self.is_place else "TEXT"}
        one = "{" + ",".join(self.choices) + "}" if self.choices else names[self.kind]
        return f"{one} [{one} ...]" if self.count is None else " ".join([one] * self.count)


class FormerOption(NamedTuple):
    """An option's name in older releases, and its name today."""

    former: str
    name: str


@functools.cache
def options_of(kind: type, path: tuple[str, ...] = ()) -> tuple[Option, ...]:
    """All options of a command's dataclass, those of inner dataclasses last."""
    hints, texts = get_type_hints(kind, include_extras=True), _texts(kind)
    own, inner = [], []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            inner.extend(options_of(hints[field.name], (*path, field.name)))
        else:
            own.append(_option(field, hints[field.name], (*path, field.name), texts.get(field.name, "")))
    return (*own, *inner)


def names_of(kind: type, otherwise: Mapping[str, str]) -> Mapping[str, str]:
    """{argument: option} for errors: fields of the dataclass and of inner ones, of which the first with a name counts.

    otherwise: {argument: field} for arguments whose field has another name: {"num_inference_steps": "steps"}.
    """
    names: dict[str, str] = {}
    for option in options_of(kind):
        names.setdefault(option.path[-1], option.name)
    renamed = {argument: names[field] for argument, field in otherwise.items() if field in names}
    return {name: option for name, option in names.items() if name not in otherwise} | renamed


def _option(field: dataclasses.Field, hint: object, path: tuple[str, ...], about: str) -> Option:
    marks: set[object] = set()
    optional, count = False, 1
    while get_origin(hint):
        arguments = get_args(hint)
        if get_origin(hint) is Annotated:
            hint, *new = arguments
            marks |= set(new)
        elif get_origin(hint) in (Union, types.UnionType):
            [hint] = [argument for argument in arguments if argument is not types.NoneType]
            optional = True
        elif get_origin(hint) is tuple:
            count = None if arguments[1:] == (...,) else len(arguments)
            hint = arguments[0]
        elif get_origin(hint) is Literal:
            break
    kind = str if get_origin(hint) is Literal else hint
    assert isinstance(kind, type)
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    former = next((mark.name for mark in marks if isinstance(mark, FormerName)), None)
    return Option(
        path=path,
        about=about,
        kind=kind,
        choices=get_args(hint) if get_origin(hint) is Literal else (),
        count=count,
        optional=optional,
        is_place=hint is Path or PATH_OR_HUB_ID in marks,
        positional=_POSITIONAL in marks,
        required=required,
        default=None if required else field.default,
        former_path=None if former is None else (*path[:-1], former),
        former_values={mark.former: mark.value for mark in marks if isinstance(mark, FormerValue)},
    )


def _written(path: tuple[str, ...]) -> str:
    return "--" + ".".join(path).replace("_", "-")


def _opposite(path: tuple[str, ...]) -> str:
    return _written((*path[:-1], f"no-{path[-1]}"))


def _texts(kind: type) -> Mapping[str, str]:
    """{field: the text below it, on one line} of the dataclass and its bases."""
    found: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        if dataclasses.is_dataclass(parent):
            found |= dict(_texts_in(parent))
    return found


def _texts_in(kind: type) -> Iterator[tuple[str, str]]:
    [declaration] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(declaration, ast.ClassDef)
    for field, text in zip(declaration.body, declaration.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            yield field.target.id, " ".join(str(text.value.value).split())
