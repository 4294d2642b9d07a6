"""Pictures in a folder, with captions beside them."""

from typing import Any

import numpy as np

from ipadapter_jax.data.files import Files, read_file
from ipadapter_jax.data.members import ROLES, grouped, record_of, split_name
from ipadapter_jax.data.records import Record
from ipadapter_jax.data.strings import Strings, printable


class FolderSource:
    """Record by record what `members` describes, sorted by name: 1.jpg with 1.txt, at any depth."""

    def __init__(self, files: Files):
        # Whatever else lies there is no part of the data, nor of its identity.
        self._files = files = Files(files.root, Strings(name for name in files.names if split_name(name)))
        records = [
            [members.get(role, -1) for role in ROLES]
            for _, members in grouped((name, number) for number, name in enumerate(files.names))
        ]
        self._members = np.array(records, np.int32).reshape(-1, len(ROLES))  # numbers of files, -1 for none

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Record:
        key = self.key(index)
        numbers = zip(ROLES, self._members[index], strict=True)
        return record_of(key, {role: read_file(self._files.path(n), key) for role, n in numbers if n >= 0})

    def key(self, index: int) -> str:
        return printable(self._files.names[self._members[index, 0]])

    def identity(self) -> dict[str, Any]:
        return self._files.identity("folder", len(self))
