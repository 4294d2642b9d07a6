"""Files and entries of a data set that are in no record, counted with names and reasons, so that nothing is lost
silently."""

from collections.abc import Iterator
from typing import NamedTuple

from ipadapter_jax.inputs.strings import replace_surrogates
from ipadapter_jax.storage.store import Store

# Reasons, in the plural, as messages give them.
NO_CAPTION = "images without a caption"
NO_IMAGE = "captions without an image that is read"
NO_BYTES = "rows without the bytes of an image"
PROMPT_WITHOUT_IMAGE = "image prompts without an image"
SECOND_CAPTION = "second captions of one image"
MISSING_IMAGE = "entries whose image does not exist"
LIST_WITHOUT_CAPTIONS = "lists without captions"
UNUSABLE_LIST = "lists that cannot be used, such as those without file_name, and are not needed"
SECOND_DOT = "names with a second dot, where a WebDataset key ends at the first: rename them to have them read"
INVALID_ROW = "rows that cannot be used, see bad_rows.jsonl"
FOLDER = "folders, whose images are not read"
OTHER = "other files"
REPORT = "unused_files.txt"
_MOST_NAMES, _SHOWN = 1000, 3


def not_read(kind: str) -> str:
    """The reason for images of a kind that is not read."""
    return f"{kind} images, which are not read: convert them to JPEG or PNG"


class Reason(NamedTuple):
    """A reason why files are not used, the number of files, and the names of the first thousand."""

    reason: str
    count: int
    names: tuple[str, ...]


class UnusedFiles:
    """Files, members and entries that are in no usable record, by reason. `records` counts those among them that a
    source has as an unusable record, such as an image without a caption."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        self.records = 0

    def add(self, reason: str, name: str, is_record: bool = False, count: int = 1) -> None:
        names = self._names.setdefault(reason, [])
        if len(names) < _MOST_NAMES:
            names.append("".join(letter if letter.isprintable() else "?" for letter in replace_surrogates(name)))
        self._counts[reason] = self._counts.get(reason, 0) + count
        self.records += count if is_record else 0

    def extend(self, other: "UnusedFiles", prefix: str = "") -> None:
        """Adds all of another collection, with a prefix to its names."""
        self.records += other.records
        for reason, count, names in other:
            for name in names:
                self.add(reason, prefix + name)
            self._counts[reason] += count - len(names)

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __iter__(self) -> Iterator[Reason]:
        """The reasons, other files last."""
        for reason in sorted(self._counts, key=lambda reason: reason == OTHER):
            yield Reason(reason, self._counts[reason], tuple(self._names[reason]))

    def names(self, reason: str) -> tuple[str, ...]:
        """The names of the first thousand files that are not used for a reason."""
        return tuple(self._names.get(reason, ()))

    def report(self) -> str:
        """The list of names as text, a line each, in the order of the reasons."""
        lines = []
        for reason, count, names in self:
            lines += [f"{name}: {reason}" for name in names]
            if count > len(names):
                lines.append(f"and {count - len(names)} more: {reason}")
        return "".join(f"{line}\n" for line in lines)


def write_report(store: Store, unused: UnusedFiles) -> None:
    """Writes the whole list as the file REPORT, or removes that file when the list is empty."""
    if len(unused):
        store.write(REPORT, unused.report().encode())
    else:
        store.remove(REPORT)


def summarize(records: int, unused: UnusedFiles) -> str:
    """ "12 records, 3 files not used: HEIC images, ... (2: 1.heic, 2.HEIC); other files (1: notes.md)", in one line."""
    line = f"{records - unused.records} records, {len(unused)} files not used"
    parts = []
    for reason, count, names in unused:
        shown = ", ".join(name[:80] for name in names[:_SHOWN])
        parts.append(f"{reason} ({count}: {shown}{', ...' if count > len(names[:_SHOWN]) else ''})")
    return line + (f": {'; '.join(parts)}" if parts else "")
