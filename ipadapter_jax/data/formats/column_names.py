"""Chooses the columns of a table that hold the image, its caption and the image prompt."""

from collections.abc import Mapping
from typing import NamedTuple

from ipadapter_jax.errors import InputError, argument

IMAGE, TEXT = "images as bytes", "text"


class _Role(NamedTuple):
    """What the column of a role holds (IMAGE or TEXT), and its usual names."""

    kind: str
    names: tuple[str, ...]


# The usual column names of each role, by preference. `conditioning_image` is left out on purpose: in published data
# sets it holds edges or poses, not an image prompt.
ROLES: Mapping[str, _Role] = {
    "image": _Role(IMAGE, ("image", "jpg", "jpeg", "png", "webp")),
    "text": _Role(TEXT, ("text", "caption", "txt", "prompt")),
    "cond_image": _Role(IMAGE, ("cond_image",)),
}


class ColumnNames(NamedTuple):
    """Names of columns; None for a column that was not given, or that does not exist."""

    image: str | None = None
    text: str | None = None
    cond_image: str | None = None


def choose_columns(given: ColumnNames, kinds: Mapping[str, str], where: str) -> ColumnNames:
    """The given columns, and the columns with usual names for those not given; only cond_image may stay None.

    kinds: for every existing column IMAGE, TEXT, or the name of another type.
    Raises InputError that lists the columns if one is missing or of another kind.
    """
    chosen = {}
    for (role, (wanted, usual)), name in zip(ROLES.items(), given, strict=True):
        names = (name,) if name else usual
        chosen[role] = next((name for name in names if kinds.get(name) == wanted), None)
        if chosen[role] is None and (name or role != "cond_image"):
            found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())[:500]
            raise InputError(
                f"{where}: no column {' or '.join(names)} that holds {wanted}; there are {found}; give "
                f"{argument(f'{role}_column')}"
            )
    return ColumnNames(**chosen)
