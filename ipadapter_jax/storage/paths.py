"""Paths as a user writes them, in which `~` is a home folder."""

import os
from pathlib import Path
from typing import Annotated, TypeVar

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.strings import is_utf8

PATH_OR_HUB_ID = "place"
PathOrHubId = Annotated[str, PATH_OR_HUB_ID]  # a setting that names a file or a folder, or something on the Hub

Given = TypeVar("Given", str, Path)


def expand_home(place: Given) -> Given:
    """The path with a leading `~` or `~user` replaced by the home folder. A name in the working folder that merely
    begins with `~` stays. Raises InputError when there is no such home folder."""
    text = str(place)
    if not text.startswith("~"):
        return place
    found = os.path.expanduser(text)
    if found.startswith("~") and not os.path.lexists(text):
        user = text.partition("/")[0]
        whose = f"of {user[1:]}" if user != "~" else "(HOME is not set, and this user has none)"
        raise InputError(f"{text}: there is no home folder {whose}; write the path without {user}")
    return type(place)(found)


def check_utf8(place: str | Path, program: str) -> None:
    """Raises InputError if the absolute path is not UTF-8, for a `program` that accepts no other paths."""
    whole = os.path.abspath(place)
    if not is_utf8(whole):
        raise InputError(f"{whole}: {program} needs a name in UTF-8; choose another place or rename the folder")
