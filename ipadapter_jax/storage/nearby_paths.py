"""What lies where a path leads nowhere: the names that a person may have meant."""

import heapq
import os
from pathlib import Path

from ipadapter_jax.inputs.strings import one_line
from ipadapter_jax.inputs.suggestions import close_matches, sort_by_similarity
from ipadapter_jax.storage.paths import expand_home

_SHOWN, _COMPARED = 3, 2000  # names in a message; of a folder, those of about the length of the missing one


def names_in(folder: str | os.PathLike[str]) -> list[str]:
    """What a folder holds but hidden files; nothing where it is none, or may not be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.name.startswith(".")]
    except (OSError, ValueError):  # ValueError: a null character
        return []


def nearby_hint(path: str | os.PathLike[str]) -> str:
    """What there is of a path that leads nowhere, to end a message of one line with: "; runs/mine exists and holds
    adapter.safetensors, README.md", the likest name first; empty where nothing of it is there, nor anything like it."""
    wanted = Path(expand_home(os.fspath(path)))
    try:
        folder = next((parent for parent in wanted.parents if os.path.exists(parent)), None)
        if folder is None:
            return ""
        if not folder.is_dir():
            return f"; {one_line(str(folder))} is a file, not a folder"
        if not os.access(folder, os.R_OK | os.X_OK):
            return ""
    except (OSError, ValueError):  # not ours to look into; a null character
        return ""
    missing, held = wanted.relative_to(folder).parts[0], names_in(folder)
    names = heapq.nsmallest(_COMPARED, held, key=lambda name: (abs(len(name) - len(missing)), name))
    given = folder not in (Path(), Path(folder.anchor))  # by the person, who knows what else lies in the working folder
    shown = sort_by_similarity(missing, names) if given else close_matches(missing, names)
    if not shown:
        return f"; {one_line(str(folder))} exists and is empty" if given else ""
    more = f" and {len(held) - _SHOWN} more" if len(held) > _SHOWN else ""
    listed = ", ".join(map(one_line, shown[:_SHOWN]))
    return (
        f"; {one_line(str(folder))} exists and holds {listed}{more}"
        if given
        else f"; {listed} {'is' if len(shown) == 1 else 'are'} here"
    )
