"""What lies where a path leads nowhere: the names that a person may have meant."""

import difflib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

from ipadapter_jax.places import expanded
from ipadapter_jax.suggestions import closest_first

_LIKE = 0.6  # of 1: a likeness from which on a name may be a slip of another
_SHOWN, _LOOKED_AT = 3, 2000  # names in a message, and in a folder


def close(word: str, names: Iterable[str]) -> list[str]:
    """Those of the names that `word` may be a slip of, the likest first."""
    return [name for name in closest_first(word, names) if _likeness(word, name) >= _LIKE]


def nearby(path: str | os.PathLike[str]) -> str:
    """What there is of a path that leads nowhere, to end a message of one line with: "; runs/mine exists and holds
    adapter.safetensors, README.md", the likest name first; empty where nothing of it is there, nor anything like it."""
    wanted = Path(expanded(os.fspath(path)))
    try:
        folder = next((parent for parent in wanted.parents if os.path.exists(parent)), None)
        if folder is None:
            return ""
        if not folder.is_dir():
            return f"; {printable(str(folder))} is a file, not a folder"
        held = [entry.name for entry in itertools.islice(os.scandir(folder), _LOOKED_AT)]
    except (OSError, ValueError):  # not ours to look into; a null character
        return ""
    missing = wanted.relative_to(folder).parts[0]
    names = [name for name in held if not name.startswith(".")]
    given = folder not in (Path(), Path(folder.anchor))  # by the person, who knows what else lies in the working folder
    shown = closest_first(missing, names) if given else close(missing, names)
    if not shown:
        return f"; {printable(str(folder))} exists and is empty" if given else ""
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    listed = ", ".join(map(printable, shown[:_SHOWN]))
    return f"; {printable(str(folder))} exists and holds {listed}{more}" if given else f"; {listed} is here"


def printable(text: str) -> str:
    """For a message of one line: what cannot be printed, also bytes that are not UTF-8, as escapes, and not pages."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= 200 else f"{shown[:200]} ..."


def _likeness(word: str, name: str) -> float:
    return difflib.SequenceMatcher(None, word.lower()[:200], name.lower()[:200]).ratio()
