"""Groups files into records by their stems: the rules for folders and for tar shards.

    dogs/1.jpg        the image; all extensions of `images/formats.py`
    dogs/1.txt        its caption in UTF-8
    dogs/1.caption    the same, where there is no .txt
    dogs/1.json       from img2dataset; its "caption" counts if there is no caption file
    dogs/1.cond.jpg   the image prompt, if it is not the image itself

This is img2dataset's layout, in its output formats `files` and `webdataset`. In a folder a stem ends at the last dot,
as in photo.v2.jpg; in a tar shard at the first dot of the base name, as in WebDataset: 1.seg.png is another member of
1, and in no record. Images of one stem, 1.jpg and 1.png, are two records with one caption.
"""

import posixpath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ipadapter_jax.data.types import Record
from ipadapter_jax.data.unused_files import (
    NO_IMAGE,
    OTHER,
    PROMPT_WITHOUT_IMAGE,
    SECOND_CAPTION,
    SECOND_DOT,
    UnusedFiles,
    not_read,
)
from ipadapter_jax.errors import InputError
from ipadapter_jax.images.formats import is_image_name, unread_format
from ipadapter_jax.inputs.strings import replace_surrogates
from ipadapter_jax.storage.text_files import decode_text, parse_json

TEXTS = ("txt", "caption", "json")  # roles of captions, by preference
ROLES = ("image", *TEXTS, "cond")
_REASON_WITHOUT_IMAGE: Mapping[str, str] = {
    "txt": NO_IMAGE,
    "caption": NO_IMAGE,
    "json": OTHER,
    "cond": PROMPT_WITHOUT_IMAGE,
}


class Member(NamedTuple):
    """A file: its stem, its role (one of ROLES) and its extension."""

    stem: str
    role: str
    ending: str


class FileGroup(NamedTuple):
    """The files of one record: their stem, and their numbers by role."""

    stem: str
    members: dict[str, int]


class Grouped(NamedTuple):
    """The records, in the order of their first files, and the files that are in no record."""

    records: list[FileGroup]
    unused: UnusedFiles


@dataclass
class _Stem:
    """The files that share a stem: one record for each image among them."""

    shared: dict[str, int] = field(default_factory=dict)
    endings: set[str] = field(default_factory=set)  # extensions of its images


def split_name(name: str) -> Member | None:
    """The stem and the role of a file in a folder; None for a file that is in no record."""
    stem, ending = posixpath.splitext(name)
    if posixpath.basename(name).startswith("."):  # macOS leaves a ._1.jpg next to each 1.jpg
        return None
    if ending[1:].lower() in TEXTS:
        return Member(stem, ending[1:].lower(), ending)
    if not is_image_name(name):
        return None
    whole = stem.lower().endswith(".cond")
    return Member(stem[: -len(".cond")], "cond", ending) if whole else Member(stem, "image", ending)


def split_member(name: str) -> Member | None:
    """The same for a member of a tar shard."""
    folder, base = posixpath.split(name)
    key, dot, ending = base.partition(".")
    if not key or not dot:
        return None
    stem, lower = posixpath.join(folder, key), ending.lower()
    if lower in TEXTS:
        return Member(stem, lower, ending)
    if is_image_name(f"_.{lower.removeprefix('cond.')}") and "." not in lower.removeprefix("cond."):
        return Member(stem, "cond" if lower.startswith("cond.") else "image", ending)
    return None


def group_files(
    names: Iterable[str], split: Callable[[str], Member | None] = split_name, joined: bool = False
) -> Grouped:
    """Groups names, which are numbered from 0, into records.

    joined: a role that appears again starts a new record, as in concatenated shards that number their files from zero
    twice; so does an image with another extension, unless it directly follows the other files of its stem.
    """
    samples: dict[str, _Stem] = {}
    records: list[tuple[str, dict[str, int], _Stem]] = []
    names, unused, last = list(names), UnusedFiles(), None
    for number, name in enumerate(names):
        if (member := split(name)) is None:
            _leave_out(name, unused)
            continue
        stem, role, ending = member
        sample = samples.get(stem)
        again = sample is not None and role == "image" and sample.endings and ending not in sample.endings
        if sample is not None and again and (not joined or sample is last):
            records.append((stem, {"image": number}, sample))
        elif sample is None or (role in sample.shared and joined):
            sample = samples[stem] = _Stem({role: number})
            records.append((stem, {}, sample))
        elif role in sample.shared:
            unused.add(SECOND_CAPTION if role in TEXTS else OTHER, name)
            continue
        else:
            sample.shared[role] = number
        if role == "image":
            sample.endings.add(ending)
        last = sample
    return Grouped([*_whole(records, names, unused)], unused)


def _leave_out(name: str, unused: UnusedFiles) -> None:
    if not posixpath.basename(name).startswith("."):
        kind = unread_format(name)
        # A name that is in a record by the rule for folders, but not by its own rule, is a member of a shard.
        other = OTHER if split_name(name) is None else SECOND_DOT
        unused.add(other if kind is None else not_read(kind), name)


def _whole(
    records: list[tuple[str, dict[str, int], _Stem]], names: list[str], unused: UnusedFiles
) -> Iterable[FileGroup]:
    """The records that have an image, each with at most one caption."""
    for stem, own, sample in records:
        members = sample.shared | own
        if "image" not in members:
            for role, number in members.items():
                unused.add(_REASON_WITHOUT_IMAGE[role], names[number])
            continue
        texts = [role for role in TEXTS if role in members]
        for role in texts[1:]:
            number = members.pop(role)
            if role != "json" and not own:  # a .json is expected for its other entries
                unused.add(SECOND_CAPTION, names[number])
        yield FileGroup(stem, members)


def make_record(key: str, parts: dict[str, bytes], listed: str | None = None) -> Record:
    """A record from the contents of its files by role, with its caption file or a caption from a list.

    Raises InputError naming the key if there is no caption, or one that is not text.
    """
    role = next((role for role in TEXTS if role in parts), None)
    if role is None and listed is None:
        raise InputError(f'{key}: no caption; put a .txt of the same name and a text such as "a red fox" next to it')
    text = listed or "" if role is None else caption_of(role, parts[role], key)
    return Record(key, parts["image"], text, parts.get("cond"))


def caption_of(role: str, content: bytes, key: str) -> str:
    """The caption in a file of one of the roles TEXTS. Raises InputError naming the key if it holds none."""
    return _json(content, key) if role == "json" else decode_text(content, f"{key}: its .{role}").strip()


def _json(content: bytes, key: str) -> str:
    try:
        found = parse_json(content, key)
        text = found["caption"] if isinstance(found, dict) else ...
        if not isinstance(text, str | None):
            raise TypeError
        return replace_surrogates(text or "")
    except (InputError, TypeError, KeyError):
        raise InputError(f'{key}: its .json is not an object like {{"caption": "a red fox"}}') from None
