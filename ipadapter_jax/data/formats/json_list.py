"""The list format of IP-Adapter's authors, `[{"image_file": "1.png", "text": "A dog"}, ...]` (tutorial_train.py)."""

import os
from pathlib import Path
from typing import NamedTuple

from ipadapter_jax.data.file_listing import FileSize, digest, read_file, size
from ipadapter_jax.data.packed_strings import PackedStrings
from ipadapter_jax.data.types import DataIdentity, Record
from ipadapter_jax.data.unused_files import MISSING_IMAGE, UnusedFiles
from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.strings import replace_surrogates
from ipadapter_jax.storage.jsonl import parse_json_lines
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.storage.text_files import LIST_BYTES, decode_text, parse_json, read_bytes

EXAMPLE = '[{"image_file": "1.png", "text": "A dog"}, ...]'


class JsonListSource:
    """Records in the order of the list; `cond_image_file` is optional. One object per line, without brackets, is fine.

    image_root: what the names of images are relative to; the folder of the list by default.
    Raises InputError naming the entry when the list is not of this form.
    """

    def __init__(self, path: Path, image_root: Path | None = None):
        self._path = path
        self._root = path.parent if image_root is None else image_root
        entries = _entries(path)
        images, texts, conds = zip(*(_checked(entry, i, path) for i, entry in enumerate(entries)), strict=True)
        self._images, self._texts, self._conds = PackedStrings(images), PackedStrings(texts), PackedStrings(conds)
        self.unused = UnusedFiles()
        for names in zip(images, conds, strict=True):
            missing = next((name for name in names if name and size(self._path_of(name)) < 0), None)
            if missing is not None:
                self.unused.add(MISSING_IMAGE, missing, is_record=True)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        key, cond = self.key(index), self._conds[index]
        cond_image = self._read(cond, key) if cond else None
        return Record(key, self._read(self._images[index], key), self._texts[index], cond_image)

    def key(self, index: int) -> str:
        return replace_surrogates(self._images[index])

    def identity(self) -> DataIdentity:
        names = [name for names in (self._images, self._conds) for name in names if name]
        sizes = [FileSize("", size(str(self._path)))]
        sizes += [FileSize(name, size(self._path_of(name))) for name in set(names)]
        return {"kind": "json", "records": len(self), "files": len(sizes), "digest": digest(sizes)}

    def _path_of(self, name: str) -> str:
        return os.path.join(self._root, expand_home(name))

    def _read(self, name: str, key: str) -> bytes:
        return read_file(self._path_of(name), key)


class _Entry(NamedTuple):
    """An entry of the list; "" for what is absent."""

    image: str
    text: str
    cond_image: str


def _entries(path: Path) -> list[object]:
    text, remedy = decode_text(read_bytes(path, LIST_BYTES), path), f"it should look like {EXAMPLE}"
    if text.lstrip().startswith("["):
        entries = parse_json(text, path, remedy)
        assert isinstance(entries, list), "no other value begins with a bracket"
    else:
        entries = [value for _, value in parse_json_lines(text, remedy, path)]
        if (error := next((value for value in entries if isinstance(value, InputError)), None)) is not None:
            raise error
    if not entries:
        raise InputError(f"{path}: an empty list; {remedy}")
    return entries


def _checked(entry: object, number: int, path: Path) -> _Entry:
    """The names and the caption of one entry. Raises InputError naming the entry that is not of this form."""
    if not isinstance(entry, dict) or not entry.get("image_file"):
        found = f"has the keys {', '.join(map(repr, entry))}" if isinstance(entry, dict) else f"is {str(entry)[:40]!r}"
        listed = isinstance(entry, dict) and "file_name" in entry
        remedy = "give the folder of this list, called metadata.jsonl" if listed else f"it should look like {EXAMPLE}"
        raise InputError(f"{path}: entry {number} {found}, and no 'image_file'; {remedy}")
    image, text, cond = entry["image_file"], entry.get("text", ...), entry.get("cond_image_file")
    if not (isinstance(image, str) and isinstance(text, str | None) and isinstance(cond, str | None)):
        raise InputError(
            f"{path}: entry {number} holds something else than texts, or no 'text'; it should look like {EXAMPLE}"
        )
    return _Entry(image, replace_surrogates(text or ""), cond or "")
