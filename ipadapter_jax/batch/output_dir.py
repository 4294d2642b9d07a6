"""The folder of a job: its images are the truth, all other files say something about them.

    fox.png, ...      images, there when they are whole
    job.json          the settings that the job was begun with
    job.jsonl         a line for each image, there before the image is: what it was made from
    bad_rows.jsonl    rows that cannot be used, and why
    lock              held while a process is at work

Of several processes that share a folder, process p > 0 has files of its own: job-p.jsonl, bad_rows-p.jsonl; and each
has its lock, lock-p-of-P.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ipadapter_jax.batch.job_settings import CONFIGURATIONS, FILE_NAME, read_settings
from ipadapter_jax.batch.plan import ImageTask
from ipadapter_jax.batch.reference_digests import Digests, Identify, of_line, replaced, to_line, without_digests
from ipadapter_jax.batch.rows import BadRow, Row
from ipadapter_jax.errors import InputError
from ipadapter_jax.runtime.announcements import announce_if_slow
from ipadapter_jax.runtime.prefetch import ordered_map
from ipadapter_jax.storage.atomic_files import remove_partial_files, write_atomically
from ipadapter_jax.storage.config_diff import diff_configs
from ipadapter_jax.storage.file_lock import shard_lock
from ipadapter_jax.storage.jsonl import JsonlAppender, read_appended

_THREADS = 4  # that read image prompts


class JobFolder:
    """Opened by `job_folder`. `pending` are the works whose image is not there yet."""

    def __init__(
        self,
        out: Path,
        works: Sequence[ImageTask],
        settings: Mapping[str, Any],
        shard: tuple[int, int],
        identify: Identify,
    ):
        self._out, own = out, f"-{shard[0]}" if shard[0] else ""
        self._identify: Identify = identify
        self._digests: dict[int, Digests] = {}  # by the row's index
        self._bad_rows, manifest = out / f"bad_rows{own}.jsonl", out / f"job{own}.jsonl"
        there = set(os.listdir(out))
        self.pending = [work for work in works if work.image not in there]
        self._done = [work for work in works if work.image in there]
        # Nobody else is at work in it, and nothing is made: settings that made nothing may be mended.
        begun = shard[1] > 1 or any(name.endswith(".png") for name in there)
        self._agree(settings, begun)
        self._remove_leftovers({*(work.image for work in works), manifest.name, self._bad_rows.name}, shard)
        self._listed = self._listed_elsewhere(manifest, there)
        self._manifest = JsonlAppender(manifest, lambda line: _is_first(line, there, self._listed))

    def compare(self) -> None:
        """Gives images that are there their lines, where they were lost. Raises InputError when images were made
        from rows or image prompts that have changed since: nobody would notice."""
        listed: list[ImageTask] = []
        for work in self._done:
            if work.image in self._listed:
                listed.append(work)
            else:
                self.note(work)
        groups = (list(group) for _, group in itertools.groupby(listed, key=lambda work: work.row.index))
        looking = ordered_map(self._changes, groups, threads=_THREADS, ahead=4 * _THREADS)
        with announce_if_slow("looking whether image prompts have changed"), contextlib.closing(looking) as found:
            changed = [*itertools.chain.from_iterable(found)]
        if changed:
            raise InputError(
                f"{self._out}: {len(changed)} images there were made from other rows, {changed[0]}; remove these "
                "images to have them made again, or choose another --out"
            )

    def _changes(self, works: Sequence[ImageTask]) -> list[str]:
        """Of the works of one row those whose image was made from something else, each with what is different."""
        changed = []
        for work in works:
            line = self._listed[work.image]
            old, new, before = _comparable(line), _comparable(_facts(work)), of_line(line)
            if old != new:
                how = diff_configs(old, new)
            else:
                names = replaced([path.name for path in work.row.images], before, self._now(work.row, before))
                how = [f"image {name} has been replaced by another" for name in names]
            if how:
                changed.append(f"{work.image} for one ({'; '.join(how)[:500]})")
        return changed

    def _now(self, row: Row, before: Digests) -> Digests:
        return self._identify(row, before) if before else ()

    def look(self, row: Row) -> None:
        """Remembers what the image prompts of a row hold; for before they are read. Safe in threads."""
        self._digests[row.index] = self._identify(row, ())

    def write(self, work: ImageTask, png: bytes) -> None:
        """The image, under its name when it is whole. Safe in threads."""
        write_atomically(self._out / work.image, png)

    def note(self, work: ImageTask) -> None:
        """The line of an image that is about to be written. A kill may come between the two: a line without its
        image is dropped by the next process, and an image without its line would not say what it was made from."""
        self._manifest.add(_facts(work) | to_line(self._digests.get(work.row.index, ())))

    def sync(self) -> None:
        self._manifest.sync()

    def report(self, bad: Iterable[BadRow]) -> None:
        """Replaces the list of bad rows; there is no file when there are none."""
        lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in sorted(bad)]
        if lines:
            write_atomically(self._bad_rows, "".join(lines).encode("utf-8", "replace"))
        else:
            self._bad_rows.unlink(missing_ok=True)

    def close(self) -> None:
        self._manifest.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _agree(self, settings: Mapping[str, Any], begun: bool) -> None:
        """Raises InputError when the job that was `begun` here has other settings, or is something else."""
        path = self._out / FILE_NAME
        if not begun or not path.exists():
            if self._done:
                raise InputError(
                    f"{self._out} holds {self._done[0].image}, which no job has made there; choose another --out"
                )
            write_atomically(path, json.dumps(settings, indent=2).encode() + b"\n")
            return
        try:
            before = read_settings(self._out)
            known = {name: settings[name] for name in settings if name != CONFIGURATIONS or name in before}
            changed = diff_configs(before, known)
        except InputError as error:
            raise InputError(f"{path} is damaged; choose another --out ({error})") from None
        if changed:
            raise InputError(
                f"{self._out} holds a job that was begun with other settings ({'; '.join(changed[:8])}); go on with "
                "those, or choose another --out"
            )

    def _remove_leftovers(self, own: set[str], shard: tuple[int, int]) -> None:
        """What a kill has left half written; other processes may be at the like."""
        remove_partial_files(self._out, mine=lambda name: name in own or shard[1] == 1)

    def _listed_elsewhere(self, manifest: Path, there: set[str]) -> dict[str, dict]:
        """The lines of images in other manifests, of a job that had other processes, by image."""
        listed: dict[str, dict] = {}
        for path in sorted(self._out.glob("job*.jsonl")):
            if path != manifest:
                for line in read_appended(path):
                    _is_first(line, there, listed)
        return listed


@contextlib.contextmanager
def job_folder(
    out: Path, works: Sequence[ImageTask], settings: Mapping[str, Any], shard: tuple[int, int], identify: Identify
) -> Iterator[JobFolder]:
    """Opens the folder of a new job or of one to go on with, and puts right what a kill has left; `works` are all works
    of this process. Raises InputError: in use, begun with other settings, made from other rows, not a job's."""
    with shard_lock(out, shard), JobFolder(out, works, settings, shard, identify) as folder:
        folder.compare()
        yield folder


def _facts(work: ImageTask) -> dict[str, Any]:
    row = work.row
    return {
        "picture": work.image,
        "name": row.name,
        "prompt": row.prompt,
        "negative_prompt": row.negative_prompt,
        "images": [os.fsencode(path).decode("utf-8", "replace") for path in row.images],
        "seed": work.seed,
        "scale": work.scale,
    }


def _comparable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """With the names of image prompts alone, which may lie in another folder now, and without what they hold."""
    images = facts.get("images")
    names = [os.path.basename(str(path)) for path in images] if isinstance(images, list) else images
    return {**without_digests(facts), "images": names}


def _is_first(line: dict, there: set[str], listed: dict[str, dict]) -> bool:
    """Whether this is the first line of an image that is there; then it is added to `listed`."""
    image = line.get("picture")
    if not isinstance(image, str) or image not in there or image in listed:
        return False
    listed[image] = line
    return True
