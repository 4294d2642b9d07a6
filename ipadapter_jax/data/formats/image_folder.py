"""Images in a folder, with captions in files next to them or in a list."""

import numpy as np

from ipadapter_jax.data.file_listing import FileListing, read_file
from ipadapter_jax.data.formats.caption_lists import CaptionLists, is_metadata
from ipadapter_jax.data.formats.file_groups import ROLES, TEXTS, group_files, make_record, split_name
from ipadapter_jax.data.packed_strings import PackedStrings
from ipadapter_jax.data.types import DataIdentity, Record
from ipadapter_jax.data.unused_files import NO_CAPTION
from ipadapter_jax.inputs.strings import replace_surrogates


class FolderSource:
    """The records that `file_groups` describes, sorted by name: 1.jpg with 1.txt, at any depth. An image without a
    caption file has the caption from a metadata.jsonl or .csv, if there is one; text_column names its column.

    Raises InputError for a list that an image needs and that cannot be used, for a text_column that no list has, and
    for lists without captions if no image has a caption.
    """

    def __init__(self, files: FileListing, text_column: str | None = None):
        names = [name for name in files.names if not is_metadata(name)]
        found = group_files(names)
        self.unused = found.unused
        listed = CaptionLists(files.root, files.names, text_column)
        self._texts = PackedStrings(listed.texts)
        records = []
        for _, members in found.records:
            image = names[members["image"]]
            has_file = any(role in members for role in TEXTS)
            text = listed.take(image, has_file)
            if not has_file and text < 0:
                self.unused.add(NO_CAPTION, image, is_record=True)
            records.append([*(members.get(role, -1) for role in ROLES), text])
        if 0 < len(records) == self.unused.records:
            listed.check_columns()
        # Other files are not part of the data, nor of its identity.
        used = [number for number, name in enumerate(names) if split_name(name)]
        self._files = FileListing(
            files.root, PackedStrings([*(names[number] for number in used), *listed.close(self.unused)])
        )
        numbers = np.full(len(names) + 1, -1, np.int32)
        numbers[used] = np.arange(len(used))
        table = np.array(records, np.int32).reshape(-1, len(ROLES) + 1)
        self._members, self._listed = numbers[table[:, :-1]], table[:, -1]  # numbers of files and of texts, -1 for none

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Record:
        key = self.key(index)
        numbers = zip(ROLES, self._members[index], strict=True)
        parts = {role: read_file(self._files.path(n), key, role in TEXTS) for role, n in numbers if n >= 0}
        text = self._listed[index]
        return make_record(key, parts, self._texts[text] if text >= 0 else None)

    def key(self, index: int) -> str:
        return replace_surrogates(self._files.names[self._members[index, 0]])

    def identity(self) -> DataIdentity:
        return self._files.identity("folder", len(self))
