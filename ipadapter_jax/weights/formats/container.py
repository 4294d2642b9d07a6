"""Tells the format of a weight file from its first bytes; the name does not count."""

import re
from pathlib import Path

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.storage.nearby_paths import nearby_hint

SAFETENSORS, PICKLE, MSGPACK, INDEX = "safetensors", "PyTorch pickle", "Flax msgpack", "index of shards"
ARRAY = "NumPy array"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which editors on Windows put before text
_MAX_HEADER = 100_000_000  # bytes of the longest header that the safetensors library reads


def container(path: Path) -> str:
    """SAFETENSORS, PICKLE, MSGPACK, INDEX or ARRAY. Raises WeightFileError saying what else it is."""
    try:
        if not path.is_file():
            other = "is a folder, not a file" if path.is_dir() else "is a pipe or a device; give a file"
            there = other if path.exists() else f"there is no such file{nearby_hint(path)}"
            raise WeightFileError(f"{path}: {there}")
        head = _head(path)
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not head.strip():
        raise WeightFileError(f"{path}: the file is empty; download it again")
    if _is_safetensors(head):
        return SAFETENSORS
    if head.startswith(b"PK\3\4") or re.match(rb"\x80[\x02-\x05]", head):
        return PICKLE
    if head.startswith(b"\x93NUMPY"):
        return ARRAY
    text = _text(head).lower()
    for start, what in _OTHER_FORMATS.items():
        if text.startswith(start):
            raise WeightFileError(f"{path}: {what}")
    if text.startswith(b"{"):
        return INDEX
    if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
        return MSGPACK
    raise WeightFileError(
        f"{path}: not a weight file: neither .safetensors nor .bin, .ckpt or .msgpack by its first bytes; "
        "download it again"
    )


# The first bytes, in lower case, of other files that are found under the name of a weight file.
_OTHER_FORMATS = {
    b"version https://git-lfs": "a git-lfs pointer, not the weights; fetch them with `git lfs pull`",
    **dict.fromkeys(
        (b"<!doctype", b"<html", b"<?xml", b"<head"),
        "a web page, not weights; download the file itself (/resolve/ instead of /blob/)",
    ),
    b"gguf": "a GGUF file; take the model's .safetensors",
    b"\x89hdf": "an HDF5 file of Keras; take the model's .safetensors",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"rar!": "a RAR archive; unpack it first",
    **dict.fromkeys((b"\x89png", b"\xff\xd8\xff", b"riff", b"gif8"), "an image, not weights"),
}


def is_index(path: Path) -> bool:
    """Whether a file that can be opened as weights is an index of shards."""
    head = _head(path)
    return not _is_safetensors(head) and _text(head).startswith(b"{")


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER


def _head(path: Path) -> bytes:
    """The first bytes of a file, enough to tell its format."""
    with open(path, "rb") as file:
        return file.read(512)


def _text(head: bytes) -> bytes:
    """The first bytes without a byte order mark and leading white space."""
    return head.removeprefix(_BYTE_ORDER_MARK).lstrip()
