"""Reads text and JSON files within limits: whatever a file holds, the result is a value or one clear error."""

import codecs
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.nearby_paths import nearby_hint

SETTINGS_BYTES = 16 << 20  # the longest file of settings
LIST_BYTES = 1 << 30  # the longest list of records: some millions
MAX_DEPTH = 100  # of nested lists and objects: far more than settings need, far less than Python's own limit
_PIECE = 1 << 16
_BYTE_ORDER_MARKS: Mapping[bytes, str] = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def decode_text(content: bytes, place: object) -> str:
    """Decodes UTF-8, with or without a byte order mark. Raises InputError naming `place` and the encoding that the
    content seems to have: UTF-16 can be valid UTF-8 full of NUL characters."""
    found = byte_order_mark(content)
    if found is None and b"\0" in content:
        found = "UTF-16 without a byte order mark, or not text at all"
    if found is not None:
        raise InputError(f"{place} is {found}: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None


def encode_utf8(text: str) -> bytes:
    """Encodes any string. A lone surrogate, which stands for a byte of a file name that is not UTF-8, is written as
    JSON writes it, \\udcff."""
    return text.encode("utf-8", "backslashreplace")


def byte_order_mark(content: bytes) -> str | None:
    """ "UTF-16" or "UTF-32" if the content begins with its byte order mark, else None."""
    return next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)


def read_bytes(
    path: str | os.PathLike[str],
    most: int = SETTINGS_BYTES,
    remedy: str = "check the file",
    *,
    shown: str | None = None,
    pipes: bool = False,
) -> bytes:
    """The content of a file. Never holds more than `most` bytes in memory.

    shown: what messages call the file, if not by its path.
    pipes: whether the file may be a pipe, which is waited for: only for a file that the user names.
    Raises InputError naming the file and the remedy when it cannot be read, is not a regular file or is longer than
    `most` bytes.
    """
    name = str(path) if shown is None else shown
    try:
        with open(path, "rb", opener=None if pipes else _without_waiting) as file:
            status = os.fstat(file.fileno())
            if not (stat.S_ISREG(status.st_mode) or (pipes and stat.S_ISFIFO(status.st_mode))):
                raise InputError(f"{name} cannot be read (it is not a regular file); {remedy}")
            content = _within(file, status.st_size, most)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        if isinstance(error, InputError):
            raise
        why = error.strerror if isinstance(error, OSError) else error
        # Files that have another name in messages are read by the thousand: no hints for those.
        there = nearby_hint(path) if shown is None and isinstance(error, FileNotFoundError) else ""
        raise InputError(f"{name} cannot be read ({why}); {remedy}{there}") from None
    if content is None:
        raise InputError(f"{name} is longer than {most >> 20} MiB, more than such a file needs; {remedy}")
    return content


def _within(file: BinaryIO, size: int, most: int) -> bytes | None:
    """The content of a file; None if it is longer than `most` bytes. The file may be longer than `size`, its reported
    size: it may have grown, and special files report 0."""
    pieces: list[bytes] = []
    total, wanted = 0, size + 1  # one piece, as a rule, and no buffer of `most` bytes
    while size <= most and total <= most:
        piece = file.read(min(wanted, most + 1 - total))
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        total, wanted = total + len(piece), _PIECE
    return None


def parse_json(
    content: str | bytes,
    place: object,
    remedy: str = "check the file",
    object_pairs_hook: Callable[[list[tuple[str, object]]], object] | None = None,
) -> object:
    """The value of a JSON text. NaN and Infinity are numbers, as in what Python writes.

    Raises InputError, "PLACE: not JSON (why); REMEDY", also for values nested more than MAX_DEPTH levels deep, for
    which recursive functions would run out of stack.
    """
    try:
        text = content if isinstance(content, str) else decode_text(content, place)
        value = json.loads(text, object_pairs_hook=object_pairs_hook)
    except InputError:
        raise
    except RecursionError:
        raise _too_deep(place, remedy) from None
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({' '.join(str(error).split())[:200]}); {remedy}") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise _too_deep(place, remedy)


def read_json(path: Path, remedy: str = "check the file", most: int = SETTINGS_BYTES) -> object:
    """The value in a JSON file of at most `most` bytes. Raises InputError naming the file and what is wrong with it."""
    return parse_json(read_bytes(path, most, remedy), path, remedy)


def read_json_object(
    path: Path, remedy: str = "check the file", most: int = SETTINGS_BYTES, *, marked: bool = True
) -> dict[str, object]:
    """`read_json` for a file that must hold an object. marked: whether it may begin with a byte order mark, which other
    programs refuse."""
    content = read_bytes(path, most, remedy)
    if not marked and content.startswith(codecs.BOM_UTF8):
        raise InputError(f"{path} begins with a byte order mark, which diffusers refuses: save it as UTF-8 without one")
    found = parse_json(content, path, remedy)
    if not isinstance(found, dict):
        raise InputError(f"{path} does not hold a JSON object; {remedy}")
    return found


def _inside(value: object) -> list[dict | list]:
    """The lists and objects directly inside a value."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, dict | list)]


def _too_deep(place: object, remedy: str) -> InputError:
    return InputError(f"{place}: not JSON (nested more than {MAX_DEPTH} levels deep: too deep for any use); {remedy}")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else opening a pipe that has no writer would never return
