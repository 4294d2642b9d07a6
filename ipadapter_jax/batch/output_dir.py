"""The output folder of a job. Its images are the truth; all other files describe them.

    fox.png, ...      images; a file exists once the image is complete
    job.json          the settings that the job was started with
    job.jsonl         a line for each image, written before the image: what it was made from
    bad_rows.jsonl    rows that cannot be used, and why
    lock              locked while a process is working

When several processes share a folder, process p > 0 has its own job-p.jsonl and bad_rows-p.jsonl, and each process has
its own lock, lock-p-of-P.
"""

import contextlib
import fnmatch
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self

from ipadapter_jax.batch.job_settings import CONFIGURATIONS, FILE_NAME, read_settings
from ipadapter_jax.batch.plan import ImageTask
from ipadapter_jax.batch.reference_digests import (
    DigestImages,
    Digests,
    digests_as_json,
    read_digests,
    replaced_images,
    without_digests,
)
from ipadapter_jax.batch.rows import BatchRow, InvalidRow
from ipadapter_jax.errors import InputError
from ipadapter_jax.runtime.announcements import announce_if_slow
from ipadapter_jax.runtime.prefetch import ordered_map
from ipadapter_jax.storage.config_diff import diff_configs
from ipadapter_jax.storage.jsonl import read_appended
from ipadapter_jax.storage.store import Store

_THREADS = 4  # that read image prompts


class JobFolder:
    """Opened by `job_folder`. `pending`: the tasks whose image does not exist yet."""

    def __init__(
        self,
        store: Store,
        tasks: Sequence[ImageTask],
        settings: Mapping[str, object],
        shard: tuple[int, int],
        digest_images: DigestImages,
    ):
        own = f"-{shard[0]}" if shard[0] else ""
        self._store = store
        self._digest_images: DigestImages = digest_images
        self._digests: dict[int, Digests] = {}  # by the row's index
        self._invalid_rows, manifest = f"bad_rows{own}.jsonl", f"job{own}.jsonl"
        existing = store.names()
        self.pending = [task for task in tasks if task.image_name not in existing]
        self._done = [task for task in tasks if task.image_name in existing]
        # Where nothing was made and no other process is working, the settings may still be corrected.
        started = shard[1] > 1 or any(name.endswith(".png") for name in existing)
        self._check_settings(settings, started)
        self._remove_leftovers({*(task.image_name for task in tasks), manifest, self._invalid_rows}, shard)
        self._listed = self._other_lines(manifest, existing)
        self._manifest = store.append_jsonl(manifest, lambda line: _is_first(line, existing, self._listed))

    def compare(self) -> None:
        """Restores lost lines of existing images. Raises InputError when images were made from rows or image prompts
        that have changed since, which nobody would notice otherwise."""
        listed: list[ImageTask] = []
        for task in self._done:
            if task.image_name in self._listed:
                listed.append(task)
            else:
                self.note(task)
        groups = (list(group) for _, group in itertools.groupby(listed, key=lambda task: task.row.index))
        looking = ordered_map(self._changes, groups, threads=_THREADS, ahead=4 * _THREADS)
        with announce_if_slow("checking whether image prompts have changed"), contextlib.closing(looking) as found:
            changed = [*itertools.chain.from_iterable(found)]
        if changed:
            raise InputError(
                f"{self._store}: {len(changed)} images there were made from other rows, {changed[0]}; remove these "
                "images to have them made again, or choose another --out"
            )

    def _changes(self, tasks: Sequence[ImageTask]) -> list[str]:
        """Describes each task of one row whose image was made from something else, with what is different."""
        changed = []
        for task in tasks:
            line = self._listed[task.image_name]
            old, new, before = _comparable(line), _comparable(_line(task)), read_digests(line)
            if old != new:
                how = diff_configs(old, new)
            else:
                names = replaced_images([path.name for path in task.row.images], before, self._now(task.row, before))
                how = [f"image {name} has been replaced by another" for name in names]
            if how:
                changed.append(f"{task.image_name} for one ({'; '.join(how)[:500]})")
        return changed

    def _now(self, row: BatchRow, before: Digests) -> Digests:
        return self._digest_images(row, before) if before else ()

    def digest(self, row: BatchRow) -> None:
        """Digests the image prompts of a row; call it before they are read. Safe in threads."""
        self._digests[row.index] = self._digest_images(row, ())

    def write(self, task: ImageTask, png: bytes) -> None:
        """Writes an image atomically. Safe in threads."""
        self._store.write(task.image_name, png)

    def note(self, task: ImageTask) -> None:
        """Writes the line of an image that is about to be written. The line comes first: the next process drops a line
        without its image, but an image without its line would not say what it was made from."""
        self._manifest.add(_line(task) | digests_as_json(self._digests.get(task.row.index, ())))

    def sync(self) -> None:
        self._manifest.sync()

    def report(self, invalid: Iterable[InvalidRow]) -> None:
        """Replaces the list of invalid rows; there is no file when all rows are valid."""
        lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in sorted(invalid)]
        if lines:
            self._store.write(self._invalid_rows, "".join(lines).encode("utf-8", "replace"))
        else:
            self._store.remove(self._invalid_rows)

    def close(self) -> None:
        self._manifest.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_settings(self, settings: Mapping[str, object], started: bool) -> None:
        """Raises InputError when the job that was `started` here has other settings, or the folder is not a job's."""
        path = self._store.path(FILE_NAME)
        if not started or self._store.size(FILE_NAME) is None:
            if self._done:
                raise InputError(
                    f"{self._store} holds {self._done[0].image_name}, which no job has made there; choose another --out"
                )
            self._store.write(FILE_NAME, json.dumps(settings, indent=2).encode() + b"\n")
            return
        try:
            before = read_settings(self._store)
            known = {name: settings[name] for name in settings if name != CONFIGURATIONS or name in before}
            changed = diff_configs(before, known)
        except InputError as error:
            raise InputError(f"{path} is damaged; choose another --out ({error})") from None
        if changed:
            raise InputError(
                f"{self._store} holds a job that was started with other settings ({'; '.join(changed[:8])}); use those "
                "settings, or choose another --out"
            )

    def _remove_leftovers(self, own: set[str], shard: tuple[int, int]) -> None:
        """Removes what a killed process left incomplete, but not what other processes are writing."""
        self._store.remove_partial_files(mine=lambda name: name in own or shard[1] == 1)

    def _other_lines(self, manifest: str, existing: set[str]) -> dict[str, dict]:
        """The lines of images in the manifests of other processes, by the image's name."""
        listed: dict[str, dict] = {}
        for name in sorted(fnmatch.filter(existing, "job*.jsonl")):
            if name != manifest:
                for line in read_appended(self._store.path(name)):
                    _is_first(line, existing, listed)
        return listed


@contextlib.contextmanager
def job_folder(
    store: Store,
    tasks: Sequence[ImageTask],
    settings: Mapping[str, object],
    shard: tuple[int, int],
    digest_images: DigestImages,
) -> Iterator[JobFolder]:
    """Opens the folder of a new job, or of one to resume, and repairs what a killed process left. tasks: all tasks of
    this process. Raises InputError when the folder is in use or not a job's, or when its job was started with other
    settings or made from other rows."""
    with store.lock(shard), JobFolder(store, tasks, settings, shard, digest_images) as folder:
        folder.compare()
        yield folder


def _line(task: ImageTask) -> dict[str, object]:
    row = task.row
    return {
        "picture": task.image_name,  # this key stays, so that older folders resume
        "name": row.name,
        "prompt": row.prompt,
        "negative_prompt": row.negative_prompt,
        "images": [os.fsencode(path).decode("utf-8", "replace") for path in row.images],
        "seed": task.seed,
        "scale": task.scale,
    }


def _comparable(facts: Mapping[str, object]) -> dict[str, object]:
    """A line with the names of image prompts instead of their paths, as they may have moved, and without digests."""
    images = facts.get("images")
    names = [os.path.basename(str(path)) for path in images] if isinstance(images, list) else images
    return {**without_digests(facts), "images": names}


def _is_first(line: dict, existing: set[str], listed: dict[str, dict]) -> bool:
    """Whether this is the first line of an existing image; then it is added to `listed`."""
    image = line.get("picture")
    if not isinstance(image, str) or image not in existing or image in listed:
        return False
    listed[image] = line
    return True
