"""Which columns of a table are the image, its caption and the image prompt."""

from collections.abc import Mapping
from typing import NamedTuple

from ipadapter_jax.errors import InputError, argument

IMAGE, TEXT = "images as bytes", "text"

# Role -> what its column holds, and its usual names by preference. `conditioning_image` is left out on purpose: in
# published sets it holds edges or poses, not an image prompt.
ROLES = {
    "image": (IMAGE, ("image", "jpg", "jpeg", "png", "webp")),
    "text": (TEXT, ("text", "caption", "txt", "prompt")),
    "cond_image": (IMAGE, ("cond_image",)),
}


class ColumnNames(NamedTuple):
    """Names of columns; None for one that was not given, or is not there."""

    image: str | None = None
    text: str | None = None
    cond_image: str | None = None


def choose_columns(given: ColumnNames, kinds: Mapping[str, str], where: str) -> ColumnNames:
    """The given columns, and those with usual names for what was not given; only cond_image may stay None.

    kinds: IMAGE, TEXT, or another type in words of every column there is.
    Raises InputError that lists them when a column is missing or of another kind.
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
