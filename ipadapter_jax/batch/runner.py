"""Runs a job, from its rows to its images: rows are loaded ahead, and images are written while the next batch is made.
A job may be killed at any moment; the same call resumes it."""

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

from ipadapter_jax.batch.output_dir import job_folder
from ipadapter_jax.batch.plan import ImageTask, batches, count_images
from ipadapter_jax.batch.reference_digests import DigestImages, digest_files
from ipadapter_jax.batch.rows import BatchRow, InvalidRow
from ipadapter_jax.errors import InputError, NonFiniteImageError
from ipadapter_jax.runtime.preemption import EXIT_PREEMPTED, GracefulShutdown
from ipadapter_jax.runtime.prefetch import ordered_map, submit
from ipadapter_jax.storage.store import LocalStore

Content = TypeVar("Content")
Generated = TypeVar("Generated")

_THREADS = 4  # that load, and as many that write: decoding and encoding an image take about as long
_MAX_UNWRITTEN = 2  # batches that may be unwritten when another starts: the device never waits for the disk


@dataclasses.dataclass
class BatchProgress:
    """The progress of one process.

    total: images of the job, those of invalid rows included. before: images that existed at the start. invalid: rows
    that could not be used so far. made: images made by this process. stopped: whether it was stopped before the end.
    """

    total: int
    before: int
    invalid: list[InvalidRow]
    made: int = 0
    stopped: bool = False

    @property
    def code(self) -> int:
        """The exit code."""
        return EXIT_PREEMPTED if self.stopped else 0


def run_job(
    tasks: Sequence[ImageTask],
    out: Path,
    *,
    settings: Mapping[str, object],
    batch_size: int,
    load: Callable[[BatchRow], Content],
    make: Callable[[list[tuple[ImageTask, Content]]], Sequence[Generated]],
    encode: Callable[[ImageTask, Generated], bytes],
    invalid: Sequence[InvalidRow] = (),
    shard: tuple[int, int] = (0, 1),
    shape_key: Callable[[ImageTask, Content], Hashable] = count_images,
    digest_images: DigestImages | None = None,
    on_progress: Callable[[BatchProgress], None] = lambda progress: None,
) -> BatchProgress:
    """Makes the images of all tasks whose image is not in `out` yet, or until SIGTERM or Ctrl-C arrives. The module
    `output_dir` says what else is written there. Call it from the main thread.

    tasks, shard: from `plan_tasks`, with the same shard. settings: JSON; all that images depend on besides the rows.
    load: reads a row's files. Called once per row, ahead of time, in threads. A row for which it raises InputError is
      invalid, and the next row takes its place. A few batches of what it returns are in memory.
    make: the images of a batch, whose items have the same `shape_key`, by default the number of image prompts; the
      last batch of each key is smaller. The images may still be computing when it returns. NonFiniteImageError makes
      the row of that image alone invalid.
    encode: encodes an image as PNG, in threads, while the next batch is made.
    invalid: rows that `read_rows` could not use; process 0 reports them.
    digest_images: digests of a row's image prompts, computed in threads; by default those of its files. Images whose
      image prompts have changed since are refused.
    on_progress: called when a batch is written.
    Raises InputError when the folder cannot be used, and what `make` and `encode` raise. Finished images stay.
    """
    found = list(invalid) if shard[0] == 0 else []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            job_folder(LocalStore(out), tasks, settings, shard, digest_images or digest_files())
        )
        folder.report(found)
        progress = BatchProgress(total=len(tasks), before=len(tasks) - len(folder.pending), invalid=found)
        stop = stack.enter_context(GracefulShutdown())
        writers = stack.enter_context(ThreadPoolExecutor(_THREADS))

        def digest_and_load(row: BatchRow) -> Content:
            folder.digest(row)
            return load(row)

        items = stack.enter_context(
            contextlib.closing(_load_rows(folder.pending, digest_and_load, 2 * batch_size, found))
        )
        writing: deque[list[Future[None]]] = deque()

        def write(task: ImageTask, image: Generated) -> None:
            folder.write(task, encode(task, image))

        def finish(most: int) -> None:
            """Waits until at most `most` batches are unwritten."""
            while len(writing) > most:
                for written in writing.popleft():
                    written.result()
                    progress.made += 1
                on_progress(progress)

        for batch in batches(items, batch_size, shape_key):
            if stop.requested:
                progress.stopped = True
                break
            pairs = _make_batch(batch, make, found)
            for task, _ in pairs:
                folder.note(task)
            folder.sync()
            writing.append([submit(writers, write, task, image) for task, image in pairs])
            finish(_MAX_UNWRITTEN)
        finish(0)
        folder.report(found)
    return progress


def _make_batch(
    batch: list[tuple[ImageTask, Content]],
    make: Callable[[list[tuple[ImageTask, Content]]], Sequence[Generated]],
    invalid: list[InvalidRow],
) -> list[tuple[ImageTask, Generated]]:
    """The tasks of a batch with their images. A batch with a non-finite image is made again one by one; tasks whose
    image is not finite are left out and added to `invalid`."""
    try:
        return list(zip((task for task, _ in batch), make(batch), strict=True))
    except NonFiniteImageError as error:
        if len(batch) == 1:
            invalid.append(InvalidRow(batch[0][0].row.line, str(error)))
            return []
        return [pair for item in batch for pair in _make_batch([item], make, invalid)]


@dataclasses.dataclass(frozen=True, eq=False)
class _LoadedRow(Generic[Content]):
    """The tasks of one row, and what was loaded for it or why that failed."""

    tasks: list[ImageTask]
    content: Content | InputError


def _load_rows(
    tasks: Sequence[ImageTask], load: Callable[[BatchRow], Content], ahead: int, invalid: list[InvalidRow]
) -> Generator[tuple[ImageTask, Content], None, None]:
    """The tasks with what `load` returns for their rows. Rows for which it raises InputError are left out and added to
    `invalid`."""

    def attempt(group: list[ImageTask]) -> _LoadedRow[Content]:
        try:
            return _LoadedRow(group, load(group[0].row))
        except InputError as error:
            return _LoadedRow(group, error)

    groups = (list(group) for _, group in itertools.groupby(tasks, key=lambda task: task.row.index))
    with contextlib.closing(ordered_map(attempt, groups, threads=_THREADS, ahead=ahead)) as attempts:
        for loaded in attempts:
            if isinstance(loaded.content, InputError):
                invalid.append(InvalidRow(loaded.tasks[0].row.line, str(loaded.content)))
            else:
                for task in loaded.tasks:
                    yield task, loaded.content
