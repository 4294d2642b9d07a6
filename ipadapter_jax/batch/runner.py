"""A job, from its rows to its images: rows are loaded ahead, batch after batch is made, and what was made is written
meanwhile. It may be killed at any moment; the same call goes on from there."""

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ipadapter_jax.batch.output_dir import job_folder
from ipadapter_jax.batch.plan import ImageTask, batches, by_images
from ipadapter_jax.batch.reference_digests import Identify, of_files
from ipadapter_jax.batch.rows import BadRow, Row
from ipadapter_jax.errors import InputError, NonFiniteImageError
from ipadapter_jax.runtime.preemption import EXIT_PREEMPTED, GracefulShutdown
from ipadapter_jax.runtime.prefetch import ordered_map, submit

Content = TypeVar("Content")
Generated = TypeVar("Generated")

_THREADS = 4  # that load, and as many that write: decoding and encoding an image take about as long
_IN_FLIGHT = 2  # batches that may be unwritten when another is begun: the device never waits for the disk


@dataclasses.dataclass
class BatchProgress:
    """Of one process: images in all, those that were there before, bad rows so far (whose images count in all the
    same), images made now, and whether it was stopped before the end."""

    total: int
    before: int
    bad: list[BadRow]
    made: int = 0
    stopped: bool = False

    @property
    def code(self) -> int:
        """The exit code."""
        return EXIT_PREEMPTED if self.stopped else 0


def run_job(
    works: Sequence[ImageTask],
    out: Path,
    *,
    settings: Mapping[str, Any],
    batch_size: int,
    load: Callable[[Row], Content],
    make: Callable[[list[tuple[ImageTask, Content]]], Sequence[Generated]],
    encode: Callable[[ImageTask, Generated], bytes],
    bad: Sequence[BadRow] = (),
    shard: tuple[int, int] = (0, 1),
    kind: Callable[[ImageTask, Content], Hashable] = by_images,
    identify: Identify | None = None,
    on_progress: Callable[[BatchProgress], None] = lambda tally: None,
) -> BatchProgress:
    """Makes the works whose image is not in `out` yet, or those until SIGTERM or Ctrl-C. `folder` says what else is
    left there. For the main thread.

    works, shard: from `plan`, with the same shard. settings: JSON; all that images depend on beside the rows.
    load: what is needed of a row's files, called once a row, ahead of time, in threads; an InputError makes it a bad
      row, which the next one replaces. A few batches of what it returns are in memory.
    make: the images of a batch, all of one `kind`, by default that of the number of image prompts; the last ones of a
      kind are smaller. They need not be computed when it returns. A NonFiniteImageError costs the image alone.
    encode: an image as PNG, in threads, while the next batch is made.
    bad: rows that cannot be used, as `read_rows` found; process 0 reports them.
    identify: what a row's image prompts hold, in threads; by default digests of its files. Images whose image prompts
      hold something else by now are refused.
    on_progress: called when a batch is written.
    Raises InputError when the folder cannot be used, and what `make` and `encode` raise; what was made is kept.
    """
    found = list(bad) if shard[0] == 0 else []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(job_folder(out, works, settings, shard, identify or of_files()))
        folder.report(found)
        tally = BatchProgress(total=len(works), before=len(works) - len(folder.pending), bad=found)
        stop = stack.enter_context(GracefulShutdown())
        writers = stack.enter_context(ThreadPoolExecutor(_THREADS))

        def look_and_load(row: Row) -> Content:
            folder.look(row)
            return load(row)

        items = stack.enter_context(contextlib.closing(_loaded(folder.pending, look_and_load, 2 * batch_size, found)))
        writing: deque[list[Future[None]]] = deque()

        def write(work: ImageTask, image: Generated) -> None:
            folder.write(work, encode(work, image))

        def finish(most: int) -> None:
            """Waits until at most `most` batches are unwritten."""
            while len(writing) > most:
                for written in writing.popleft():
                    written.result()
                    tally.made += 1
                on_progress(tally)

        for batch in batches(items, batch_size, kind):
            if stop.requested:
                tally.stopped = True
                break
            pairs = _made(batch, make, found)
            for work, _ in pairs:
                folder.note(work)
            folder.sync()
            writing.append([submit(writers, write, work, image) for work, image in pairs])
            finish(_IN_FLIGHT)
        finish(0)
        folder.report(found)
    return tally


def _made(
    batch: list[tuple[ImageTask, Content]],
    make: Callable[[list[tuple[ImageTask, Content]]], Sequence[Generated]],
    bad: list[BadRow],
) -> list[tuple[ImageTask, Generated]]:
    """The works of a batch with their images; those that come out as none, which only single ones tell, are left out
    and added to `bad`."""
    try:
        return list(zip((work for work, _ in batch), make(batch), strict=True))
    except NonFiniteImageError as error:
        if len(batch) == 1:
            bad.append(BadRow(batch[0][0].row.line, str(error)))
            return []
        return [pair for item in batch for pair in _made([item], make, bad)]


def _loaded(
    works: Sequence[ImageTask], load: Callable[[Row], Content], ahead: int, bad: list[BadRow]
) -> Generator[tuple[ImageTask, Content], None, None]:
    """The works with what `load` gives for their rows; rows that it refuses are left out and added to `bad`."""

    def attempt(group: list[ImageTask]) -> tuple[list[ImageTask], Content | InputError]:
        try:
            return group, load(group[0].row)
        except InputError as error:
            return group, error

    groups = (list(group) for _, group in itertools.groupby(works, key=lambda work: work.row.index))
    with contextlib.closing(ordered_map(attempt, groups, threads=_THREADS, ahead=ahead)) as attempts:
        for group, content in attempts:
            if isinstance(content, InputError):
                bad.append(BadRow(group[0].row.line, str(content)))
            else:
                yield from ((work, content) for work in group)
