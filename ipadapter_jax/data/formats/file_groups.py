"""Files that belong to one record share a stem: the rule for folders and for tar shards.

    dogs/1.jpg        the image; all endings of `image_files`
    dogs/1.txt        its caption in UTF-8
    dogs/1.caption    the same, where there is no .txt
    dogs/1.json       what img2dataset writes; "caption" counts where there is no caption in a file of its own
    dogs/1.cond.jpg   the image prompt, where it is not the image itself

This is img2dataset's layout, in its output formats `files` and `webdataset`. In a folder a stem ends at the last dot,
as in photo.v2.jpg; in a tar shard at the first dot of the base name, which is WebDataset's rule: 1.seg.png is another
member of 1, and in no record. Images of one stem, 1.jpg and 1.png, are two records with one caption.
"""

import posixpath
from collections.abc import Callable, Iterable
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
_ALONE = {"txt": NO_IMAGE, "caption": NO_IMAGE, "json": OTHER, "cond": PROMPT_WITHOUT_IMAGE}


class Member(NamedTuple):
    """A file: its stem, its role (one of ROLES) and its ending."""

    stem: str
    role: str
    ending: str


class Grouped(NamedTuple):
    """Of every record its stem and the numbers of its files by role, in the order of their first files."""

    records: list[tuple[str, dict[str, int]]]
    unused: UnusedFiles


@dataclass
class _Sample:
    """What shares a stem: a record for each of its images."""

    shared: dict[str, int] = field(default_factory=dict)
    endings: set[str] = field(default_factory=set)  # of its images


def split_name(name: str) -> Member | None:
    """A file in a folder; None for one that has no part in a record."""
    stem, ending = posixpath.splitext(name)
    if posixpath.basename(name).startswith("."):  # macOS leaves a ._1.jpg beside each 1.jpg
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
    """Names, whose numbers count from 0, to records.

    joined: a role that comes again opens a new record, as in shards that were joined and count from zero twice; so
    does an image of another ending, unless it follows right upon the other files of its stem.
    """
    samples: dict[str, _Sample] = {}
    records: list[tuple[str, dict[str, int], _Sample]] = []
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
            sample = samples[stem] = _Sample({role: number})
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
        # Only members of shards can have a part by the rule for folders, and none by their own.
        other = OTHER if split_name(name) is None else SECOND_DOT
        unused.add(other if kind is None else not_read(kind), name)


def _whole(
    records: list[tuple[str, dict[str, int], _Sample]], names: list[str], unused: UnusedFiles
) -> Iterable[tuple[str, dict[str, int]]]:
    """The records that have an image, each with one caption at most."""
    for stem, own, sample in records:
        members = sample.shared | own
        if "image" not in members:
            for role, number in members.items():
                unused.add(_ALONE[role], names[number])
            continue
        texts = [role for role in TEXTS if role in members]
        for role in texts[1:]:
            number = members.pop(role)
            if role != "json" and not own:  # a .json is there for its other entries
                unused.add(SECOND_CAPTION, names[number])
        yield stem, members


def make_record(key: str, parts: dict[str, bytes], listed: str | None = None) -> Record:
    """A record from the contents of its files by role, or with a caption from a list.

    Raises InputError naming the key where there is no caption, or one that is not text.
    """
    role = next((role for role in TEXTS if role in parts), None)
    if role is None and listed is None:
        raise InputError(f'{key}: no caption; put a .txt of the same name and a text such as "a red fox" beside it')
    text = listed or "" if role is None else caption_of(role, parts[role], key)
    return Record(key, parts["image"], text, parts.get("cond"))


def caption_of(role: str, content: bytes, key: str) -> str:
    """The caption in a file of one of the roles TEXTS. Raises InputError naming the key where it holds none."""
    return _json(content, key) if role == "json" else decode_text(content, f"{key}: its .{role}").strip()


def _json(content: bytes, key: str) -> str:
    try:
        text = parse_json(content, key)["caption"]
        if not isinstance(text, str | None):
            raise TypeError
        return replace_surrogates(text or "")
    except (InputError, TypeError, KeyError):
        raise InputError(f'{key}: its .json is not an object like {{"caption": "a red fox"}}') from None
