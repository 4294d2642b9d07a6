"""Errors of bad input: one line each, which names Python arguments or, under the command line, its options."""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

_OPTIONS: ContextVar[Mapping[str, str]] = ContextVar("options", default={})  # noqa: B039, nothing writes to it


class InputError(ValueError):
    """Bad input: one line that names the offender and the remedy. The command line shows it and exits with 2."""


class NonFiniteImageError(InputError):
    """A generated image holds NaN or infinity. Other images of its batch may be finite."""


class WeightFileError(InputError):
    """A weight file that cannot be used: damaged, malicious, of another kind, or made for another model."""


def argument(name: str, *value: object, part: str = "") -> str:
    """How an error names an argument and its value: width=65 in Python, --width 65 under the command line.

    part: a part of the argument that may have an option of its own, as `errors_name_options` says.
    """
    option = _OPTIONS.get().get(f"{name}/{part}" if part else name)
    if option is None:
        return "=".join([name, *map(str, value)])
    return " ".join([option, *map(str, value)])


def option(name: str) -> str:
    """The option for an argument that is positional in Python, in parentheses: " (--model)"; "" without an option."""
    found = _OPTIONS.get().get(name)
    return "" if found is None else f" ({found})"


@contextlib.contextmanager
def errors_name_options(options: Mapping[str, str]) -> Iterator[None]:
    """Inside this context errors name options in place of arguments: {"width": "--width"}, and for a part of an
    argument {"ip_adapter_scale/layers": "--layer-scales"}."""
    before = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(before)
