"""What a person did wrong, said in one line and in the words of whoever is told: a caller in Python has arguments, a
command line options."""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

_OPTIONS: ContextVar[Mapping[str, str]] = ContextVar("options", default={})  # noqa: B039, which nobody writes to


class InputError(ValueError):
    """Bad input: one line that names the offender and the remedy. The command line shows it and exits with 2."""


class NonFiniteImageError(InputError):
    """An image came out that is none; others of its batch may be good."""


class WeightFileError(InputError):
    """A weight file that cannot be used: damaged, hostile, of another kind, or made for another model."""


def argument(name: str, *value: object, part: str = "") -> str:
    """An argument, with its value where one is given: width=65 in Python, --width 65 where a command line has an option
    for it. A `part` of an argument may have an option of its own."""
    option = _OPTIONS.get().get(f"{name}/{part}" if part else name)
    if option is None:
        return "=".join([name, *map(str, value)])
    return " ".join([option, *map(str, value)])


def option(name: str) -> str:
    """The option for an argument that Python gives without its name: " (--model)", or nothing."""
    found = _OPTIONS.get().get(name)
    return "" if found is None else f" ({found})"


@contextlib.contextmanager
def errors_name_options(options: Mapping[str, str]) -> Iterator[None]:
    """While this lasts, errors name a command line's options in the place of arguments: {"width": "--width"}, and
    {"ip_adapter_scale/layers": "--layer-scales"} for a part of one."""
    before = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(before)
