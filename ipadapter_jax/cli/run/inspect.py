"""Runs `ipadapter-jax inspect`: what a file is, and what it needs."""

import json
from collections.abc import Iterator, Mapping

from ipadapter_jax.cli.generate import Generate
from ipadapter_jax.cli.inspect import Inspect
from ipadapter_jax.cli.option_types import names_of
from ipadapter_jax.cli.options import ARGUMENTS
from ipadapter_jax.errors import errors_name_options
from ipadapter_jax.weights.inspect import inspect_weights


def inspect(args: Inspect) -> int:
    """Prints the facts. Raises InputError for what is damaged or holds no weights."""
    if args.json:  # for programs, which have no options
        print(json.dumps(inspect_weights(args.file), indent=2))
        return 0
    with errors_name_options(names_of(Generate, ARGUMENTS)):  # what it is of use for
        print("\n".join(_rows(inspect_weights(args.file))))
    return 0


def _rows(facts: Mapping[str, object], indent: str = "") -> Iterator[str]:
    names = {name: _printable(name, 40) for name in facts}
    width = max(map(len, names.values()), default=0)
    for fact, value in facts.items():
        name = names[fact]
        if isinstance(value, Mapping):
            yield f"{indent}{name}" + ("" if value else "  none")
            yield from _rows(value, indent + "  ")
        else:
            shown = (
                f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _printable(str(value), 300)
            )
            yield f"{indent}{name:<{width}}  {shown}"


def _printable(text: str, length: int) -> str:
    """A file's own words without what a terminal would act on, and not pages of them."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[:length])
    return shown + " ..." * (len(text) > length)
