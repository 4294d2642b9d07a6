"""Images in a folder, with captions beside them or in a list."""

from typing import Any

import numpy as np

from ipadapter_jax.data.files import Files, read_file
from ipadapter_jax.data.members import ROLES, TEXTS, grouped, record_of, split_name
from ipadapter_jax.data.metadata import is_metadata, read_metadata
from ipadapter_jax.data.records import Record
from ipadapter_jax.data.strings import Strings, printable
from ipadapter_jax.data.unused import NO_CAPTION, NOT_THERE, OTHER, SECOND, Unused


class FolderSource:
    """Record by record what `members` describes, sorted by name: 1.jpg with 1.txt, at any depth. Images without a
    caption file have that of a metadata.jsonl or .csv, if there is one; text_column names its column.

    Raises InputError for a list that cannot be used.
    """

    def __init__(self, files: Files, text_column: str | None = None):
        names = [name for name in files.names if not is_metadata(name)]
        found = grouped(names)
        self.unused = found.unused
        listed = _Listed(files, text_column)
        self._texts = Strings(listed.texts)
        records = []
        for _, members in found.records:
            image = names[members["image"]]
            has_file = any(role in members for role in TEXTS)
            text = listed.take(image, has_file)
            if not has_file and text < 0:
                self.unused.add(NO_CAPTION, image, is_record=True)
            records.append([*(members.get(role, -1) for role in ROLES), text])
        # Whatever else lies there is no part of the data, nor of its identity.
        kept = [number for number, name in enumerate(names) if split_name(name)]
        self._files = Files(files.root, Strings([*(names[number] for number in kept), *listed.close(self.unused)]))
        numbers = np.full(len(names) + 1, -1, np.int32)
        numbers[kept] = np.arange(len(kept))
        table = np.array(records, np.int32).reshape(-1, len(ROLES) + 1)
        self._members, self._listed = numbers[table[:, :-1]], table[:, -1]  # numbers of files and of texts, -1 for none

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Record:
        key = self.key(index)
        numbers = zip(ROLES, self._members[index], strict=True)
        parts = {role: read_file(self._files.path(n), key, role in TEXTS) for role, n in numbers if n >= 0}
        text = self._listed[index]
        return record_of(key, parts, self._texts[text] if text >= 0 else None)

    def key(self, index: int) -> str:
        return printable(self._files.names[self._members[index, 0]])

    def identity(self) -> dict[str, Any]:
        return self._files.identity("folder", len(self))


class _Listed:
    """The captions that lists give, and which of them are needed."""

    def __init__(self, files: Files, text_column: str | None):
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}  # of the texts, by image
        self._lists = read_metadata(files.root, files.names, text_column)
        self._owners: dict[str, str] = {}
        self._seen: dict[str, bool] = {}  # images with entries: whether one is needed
        self._again: list[str] = []
        for file, entries in self._lists.items():
            own: set[str] = set()
            for name, text in entries:
                if text is None:
                    continue
                if name in own:
                    self._again.append(f"{file}: {name}")
                    continue
                own.add(name)  # a list in a deeper folder knows better
                self._numbers[name], self._owners[name] = len(self.texts), file
                self.texts.append(text)

    def take(self, image: str, has_file: bool) -> int:
        """The number of an image's text, -1 where it has none or does not need it."""
        number = self._numbers.get(image, -1)
        if number >= 0:
            self._seen[image] = not has_file
        return -1 if has_file else number

    def close(self, unused: Unused) -> list[str]:
        """Counts the entries and lists that nothing needs; returns the lists that are used."""
        for name, file in self._owners.items():
            if name not in self._seen:
                unused.add(NOT_THERE, f"{file}: {name}")
            elif not self._seen[name]:
                unused.add(SECOND, f"{file}: {name}")
        for name in self._again:
            unused.add(SECOND, name)
        used = {self._owners[name] for name, needed in self._seen.items() if needed}
        for file in self._lists:
            if file not in used and file not in self._owners.values():
                unused.add(OTHER, file)
        return sorted(used)
