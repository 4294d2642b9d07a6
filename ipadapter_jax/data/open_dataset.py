"""Opens a data set of any known format, which is recognized from the files themselves."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ipadapter_jax.data.file_listing import FileListing, find_files
from ipadapter_jax.data.formats.array_record import ArrayRecordSource
from ipadapter_jax.data.formats.caption_lists import is_metadata
from ipadapter_jax.data.formats.column_names import ColumnNames
from ipadapter_jax.data.formats.image_folder import FolderSource
from ipadapter_jax.data.formats.json_list import EXAMPLE, JsonListSource
from ipadapter_jax.data.formats.parquet import ParquetSource
from ipadapter_jax.data.formats.tar import TarSource
from ipadapter_jax.data.formats.tfds import FEATURES, INFO, TfdsSource
from ipadapter_jax.data.types import RecordSource
from ipadapter_jax.data.unused_files import OTHER
from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.images.formats import SUFFIXES as IMAGES
from ipadapter_jax.images.formats import unread_format
from ipadapter_jax.inputs.strings import replace_surrogates
from ipadapter_jax.storage.nearby_paths import nearby_hint
from ipadapter_jax.storage.paths import expand_home

# The formats in a folder, by preference: img2dataset leaves .parquet files next to its shards and images.
SUFFIXES: Mapping[str, re.Pattern[str]] = {
    "tar": re.compile(r"\.tar$", re.IGNORECASE),
    "array_record": re.compile(r"\.array_?record(-\d+-of-\d+)?$", re.IGNORECASE),
    "folder": re.compile(rf"\.({'|'.join(suffix[1:] for suffix in sorted(IMAGES))})$", re.IGNORECASE),
    "parquet": re.compile(r"\.parquet$", re.IGNORECASE),
}
MAGIC: Mapping[bytes, str] = {
    b"PAR1": "parquet",
    bytes.fromhex("83af70d10d884a3f"): "array_record",
}  # the latter begins Riegeli files
FORMATS = (
    f"give a JSON list like {EXAMPLE}, a folder of images with a .txt caption next to each, img2dataset's .tar, "
    "Parquet or ArrayRecord files, or a folder of TensorFlow Datasets"
)
HINTS: Mapping[str, str] = {
    ".json": "give the list itself, not its folder",
    ".jsonl": "give the list itself, not its folder",
    ".csv": "call it metadata.csv, with the columns file_name and text, and give the folder of its images",
    ".arrow": 'save it as Parquet: dataset.to_parquet("data.parquet")',
    ".gz": "unpack it first: a compressed file cannot be read at random",
    ".tgz": "unpack it first: a compressed file cannot be read at random",
    ".zip": "unpack it first: a compressed file cannot be read at random",
}
PROBES = 8


def open_dataset(
    path: str,
    *,
    image_root: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    cond_image_column: str | None = None,
) -> RecordSource:
    """The data set at `path`: a file, a folder, or a pattern such as "shards/*.tar"; see FORMATS.

    image_root: what the names in a JSON list are relative to; the folder of the list by default.
    image_column, text_column, cond_image_column: for Parquet and TensorFlow Datasets, where `column_names` does not
    know the names; text_column also for the metadata.jsonl or .csv of a folder. `unused` of what is returned says which
    files and entries are in no record.
    Raises InputError naming what is wrong and what would be right, also when no record can be used.
    """
    columns = ColumnNames(image_column, text_column, cond_image_column)
    files = find_files(path)
    kind = _kind(path, files)
    if image_root is not None and kind != "json":
        raise InputError(
            f"{argument('image_root', image_root)} is for JSON lists, and {path} is of the kind {kind}; leave it out"
        )
    listed = kind == "folder" and any(map(is_metadata, files.names))
    without = columns._replace(text=None) if listed else columns
    if any(without) and kind not in ("parquet", "tfds"):
        name = next(name for name in without if name)
        raise InputError(f"{path} is of the kind {kind} and has no columns; leave {name!r} out")
    source = _open(kind, files, image_root, columns)
    _probe(path, source)
    return source


def _open(kind: str, files: FileListing, image_root: str | None, columns: ColumnNames) -> RecordSource:
    if kind == "json":
        root = None if image_root is None else Path(expand_home(image_root))
        if root is not None and not root.is_dir():
            raise InputError(
                f"{argument('image_root', image_root)} is not a folder; give the one that 'image_file' is relative "
                f"to{nearby_hint(root)}"
            )
        return JsonListSource(Path(files.path(0)), root)
    if kind == "tfds":
        return TfdsSource(files, columns)
    if kind == "folder":
        return FolderSource(files, columns.text)
    every = files
    if len(files) > 1:
        files = files.matching(SUFFIXES[kind])
    if kind == "parquet":
        source = ParquetSource(files, columns)
    else:
        source = TarSource(files) if kind == "tar" else ArrayRecordSource(files)
    for name in every.names if len(every) > len(files) else ():
        if not SUFFIXES[kind].search(name):
            source.unused.add(OTHER, name)
    return source


def _kind(path: str, files: FileListing) -> str:
    """The format of the files. Raises InputError when it is not known, or when the path has to be given otherwise."""
    folder = Path(expand_home(path))
    if len(files) == 1 and not folder.is_dir():
        return _kind_of_file(files.path(0))
    if (folder / INFO).is_file() and (folder / FEATURES).is_file():
        return "tfds"
    suffixes = Counter(os.path.splitext(name)[1] for name in files.names)
    found = {
        kind: count
        for kind, pattern in SUFFIXES.items()
        if (count := sum(n for suffix, n in suffixes.items() if pattern.search(suffix)))
    }
    kind = next(iter(found), None)
    if kind in (None, "array_record"):
        for name in files.names:
            if name.endswith("/" + FEATURES):
                raise InputError(f"{path}: give the version of the data set: {folder / os.path.dirname(name)}")
    if kind is None:
        raise _unknown(path, list(suffixes))
    if kind == "folder" and not folder.is_dir():
        raise InputError(f"{path}: give the folder of the images, so that their captions are found")
    if others := {other: count for other, count in found.items() if other not in (kind, "parquet")}:
        unused = ", ".join(f"{count} of {other}" for other, count in others.items())
        warnings.warn(f"{path}: {found[kind]} files of {kind} are read; next to them, not read: {unused}", stacklevel=3)
    return kind


def _kind_of_file(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{replace_surrogates(path)} cannot be read ({error.strerror})") from None
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[257:262] == b"ustar" or suffix == ".tar":
        return "tar"
    if suffix in (".json", ".jsonl") or head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{"):
        return "json"
    raise _unknown(path, [suffix])


def _unknown(path: str, suffixes: list[str]) -> InputError:
    remedy = next((HINTS[suffix] for suffix in suffixes if suffix in HINTS), FORMATS)
    if (image := next(filter(None, map(unread_format, (f"_{suffix}" for suffix in suffixes))), None)) is not None:
        remedy = f"{image} images are not read: convert them to JPEG or PNG"
    shown = ", ".join(sorted(suffix for suffix in suffixes if suffix)[:5]) or "no suffix"
    return InputError(f"{replace_surrogates(path)}: no training data is known in files of {shown}; {remedy}")


def _probe(path: str, source: RecordSource) -> None:
    """Raises InputError if all of a few distant records are unreadable: then the data set has another format than it
    seems. Single unreadable records are replaced during loading."""
    first = None
    for i in range(PROBES):
        try:
            source[i * len(source) // PROBES]
            return
        except InputError as error:
            first = first or error
    raise InputError(f"{path}: none of {min(PROBES, len(source))} records can be used. {first}; or {FORMATS}")
