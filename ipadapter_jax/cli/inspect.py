"""`ipadapter-jax inspect`: what a file is, and what it needs."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from ipadapter_jax.describe import describe


@dataclasses.dataclass
class Inspect:
    """Shows what a file or folder of weights is: kind, variant, base model, the image encoder it needs, tokens, dtype,
    parameters, metadata and digest."""

    file: Annotated[Path, tyro.conf.Positional]
    """A file of weights, or a folder of them."""
    json: bool = False
    """As one JSON object rather than as a table."""


def inspect(args: Inspect) -> int:
    """Prints the facts. Raises InputError for what is damaged or holds no weights."""
    facts = describe(args.file)
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_rows(facts)))
    return 0


def _rows(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
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
