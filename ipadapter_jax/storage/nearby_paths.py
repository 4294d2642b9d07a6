"""Hints for a path that does not exist: the existing names that the user may have meant."""

import heapq
import os
from pathlib import Path

from ipadapter_jax.inputs.strings import one_line
from ipadapter_jax.inputs.suggestions import close_matches, sort_by_similarity
from ipadapter_jax.storage.paths import expand_home

_SHOWN = 3  # names in a message
_COMPARED = 2000  # names of a folder that are compared: those closest in length to the missing one


def names_in(folder: str | os.PathLike[str]) -> list[str]:
    """The names in a folder without hidden files; none if it is not a folder or may not be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.name.startswith(".")]
    except (OSError, ValueError):  # ValueError: a null character
        return []


def nearby_hint(path: str | os.PathLike[str]) -> str:
    """The end of an error message about a path that does not exist: "; runs/mine exists and holds adapter.safetensors,
    README.md", the most similar name first; "" if no part of the path exists and no name is similar."""
    wanted = Path(expand_home(os.fspath(path)))
    try:
        folder = next((parent for parent in wanted.parents if os.path.exists(parent)), None)
        if folder is None:
            return ""
        if not folder.is_dir():
            return f"; {one_line(str(folder))} is a file, not a folder"
        if not os.access(folder, os.R_OK | os.X_OK):
            return ""
    except (OSError, ValueError):  # a folder that may not be read; a null character
        return ""
    missing, existing = wanted.relative_to(folder).parts[0], names_in(folder)
    names = heapq.nsmallest(_COMPARED, existing, key=lambda name: (abs(len(name) - len(missing)), name))
    given = folder not in (Path(), Path(folder.anchor))  # by the user, who knows the working folder
    shown = sort_by_similarity(missing, names) if given else close_matches(missing, names)
    if not shown:
        return f"; {one_line(str(folder))} exists and is empty" if given else ""
    more = f" and {len(existing) - _SHOWN} more" if len(existing) > _SHOWN else ""
    listed = ", ".join(map(one_line, shown[:_SHOWN]))
    return (
        f"; {one_line(str(folder))} exists and holds {listed}{more}"
        if given
        else f"; {listed} {'is' if len(shown) == 1 else 'are'} here"
    )
