"""Files that belong to one record share a stem: the rule for folders and for tar shards.

    dogs/1.jpg        the picture; also .jpeg, .png, .webp, .gif, .bmp, .tif, .tiff, .avif, .jp2
    dogs/1.txt        its caption in UTF-8
    dogs/1.json       what img2dataset writes; "caption" counts where there is no .txt
    dogs/1.cond.jpg   the image prompt, where it is not the picture itself

This is img2dataset's layout, in its output formats `files` and `webdataset`.
"""

import posixpath
from collections.abc import Iterable

from ipadapter_jax.data.records import Record
from ipadapter_jax.data.strings import printable
from ipadapter_jax.errors import InputError
from ipadapter_jax.image_files import SUFFIXES
from ipadapter_jax.texts import parse_json

ROLES = ("image", "txt", "json", "cond")


def split_name(name: str) -> tuple[str, str] | None:
    """Stem and role of a file; None for one that has no part in a record."""
    stem, suffix = posixpath.splitext(name)
    suffix = suffix.lower()
    if posixpath.basename(name).startswith("."):  # macOS leaves a ._1.jpg beside each 1.jpg
        return None
    if suffix in (".txt", ".json"):
        return stem, suffix[1:]
    if suffix not in SUFFIXES:
        return None
    return (stem[: -len(".cond")], "cond") if stem.lower().endswith(".cond") else (stem, "image")


def grouped(names: Iterable[tuple[str, int]]) -> list[tuple[str, dict[str, int]]]:
    """Names, each with its number, to (stem, {role: number}) of every record, in the order of their first files.

    A role that comes again opens a new record, as in shards that were joined and count from zero twice.
    """
    records: list[tuple[str, dict[str, int]]] = []
    current: dict[str, dict[str, int]] = {}
    for name, number in names:
        if (found := split_name(name)) is None:
            continue
        stem, role = found
        if stem not in current or role in current[stem]:
            current[stem] = {}
            records.append((stem, current[stem]))
        current[stem][role] = number
    records = [record for record in records if "image" in record[1]]
    for _, members in records:
        if "txt" in members:
            members.pop("json", None)
    return records


def record_of(key: str, parts: dict[str, bytes]) -> Record:
    """A record from the contents of its files by role. Raises InputError naming the key where there is no caption."""
    if "txt" not in parts and "json" not in parts:
        raise InputError(f'{key}: no caption; put a .txt of the same name and a text such as "a red fox" beside it')
    text = _txt(parts["txt"], key) if "txt" in parts else _json(parts["json"], key)
    return Record(key, parts["image"], text, parts.get("cond"))


def _txt(content: bytes, key: str) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise InputError(f"{key}: its .txt is not UTF-8; save the caption as UTF-8") from None


def _json(content: bytes, key: str) -> str:
    try:
        text = parse_json(content, key)["caption"]
        if not isinstance(text, str | None):
            raise TypeError
        return printable(text or "")
    except (InputError, TypeError, KeyError):
        raise InputError(f'{key}: its .json is not an object like {{"caption": "a red fox"}}') from None
