"""Batches of the one global order of the data.

The record of each sample of a batch follows from the seed alone, so every number of worker processes, threads, machines
and restarts gives the same batches, and a checkpoint stores only its step. Records that cannot be read are replaced by
a fixed rule, which changes no other sample.
"""

import atexit
import functools
import gc
import weakref
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import grain
import numpy as np

from ipadapter_jax.data.shuffle import record_order
from ipadapter_jax.data.workers import load_in_workers
from ipadapter_jax.errors import InputError

MAX_CONSECUTIVE_UNREADABLE = 64
_AHEAD = 2  # batches that a process has ready or is making: while one is completed, idle threads start the next


class SampleSource(Protocol):
    """Random access to samples from several threads. All samples of a set have the same names and shapes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...

    def key(self, index: int) -> str: ...


class SkippedRecord(NamedTuple):
    """A record that could not be used, and the reason in one line."""

    index: int
    key: str
    reason: str


class LoadedBatch(NamedTuple):
    """The samples at some positions of a global batch, arrays (positions, ...), and the records that were replaced."""

    arrays: dict[str, np.ndarray]
    skipped: list[SkippedRecord]


def load_batches(
    samples: SampleSource,
    *,
    seed: int,
    batch_size: int,
    rows: Sequence[int],
    first: int,
    count: int,
    workers: int = 0,
    threads: int = 8,
) -> Generator[LoadedBatch, None, None]:
    """Global batches first, first + 1, ... first + count - 1; of each, the samples at positions `rows` (0 <= row <
    batch_size).

    Position r of batch k is position g = k batch_size + r of the global order and reads the record
    `record_order(seed, len(samples), g)`. A record that raises is replaced by the next one that does not.
    workers: processes that load; 0 loads in this process. threads: of every process that loads; 0 loads on demand and
    nothing ahead. Memory: up to 2 batches ahead for this process, or 5 for every worker.
    Raises InputError: no samples, an invalid seed, or 64 consecutive records that cannot be read. Closing the generator
    ends its threads and processes; they also end when this process ends, however it ends.
    """
    if not len(samples):
        raise InputError("the data set has no records: give one that has")
    if not 0 <= seed < 1 << 64 or not rows or not all(0 <= row < batch_size for row in rows):
        raise InputError(f"seed {seed}, rows {rows} of {batch_size}: choose a seed in [0, 2^64) and rows of the batch")
    source = _Batches(samples, seed, batch_size, tuple(rows), first, count, threads)
    options = grain.ReadOptions(num_threads=min(threads, _AHEAD), prefetch_buffer_size=_AHEAD)
    loading = grain.MapDataset.source(source).to_iter_dataset(options)
    if workers:
        sample, _ = source.load(first * batch_size + rows[0])
        loading = load_in_workers(loading, workers, len(rows) * sum(array.nbytes for array in sample.values()))
    generator = _until_closed(loading)
    _close_at_exit(generator)
    return generator


def load_or_skip(samples: SampleSource, index: int) -> dict[str, np.ndarray] | SkippedRecord:
    """Sample `index`, or the reason why it cannot be used."""
    try:
        return samples[index]
    except MemoryError:  # not an error of the record
        raise
    except Exception as error:  # InputError, or any error of a library that reads a damaged record
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return SkippedRecord(index, samples.key(index), " ".join(f"{kind}{error}".split())[:300])


class _LoadedSample(NamedTuple):
    arrays: dict[str, np.ndarray]
    skipped: list[SkippedRecord]


@dataclass(frozen=True)
class _Batches:
    """The batches of this process, for grain's random access. All threads load the samples of one batch together, so
    that memory does not grow with their number."""

    samples: SampleSource
    seed: int
    batch_size: int
    rows: Sequence[int]
    first: int
    count: int
    threads: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> LoadedBatch:
        positions = [(self.first + index) * self.batch_size + row for row in self.rows]
        loaded = list(_pool(self.threads).map(self.load, positions) if self.threads else map(self.load, positions))
        arrays = {name: np.stack([sample[name] for sample, _ in loaded]) for name in loaded[0][0]}
        return LoadedBatch(arrays, [entry for _, skipped in loaded for entry in skipped])

    def load(self, position: int) -> _LoadedSample:
        """The sample at a position of the global order, and the records that it replaces."""
        records = len(self.samples)
        start = record_order(self.seed, records, position)
        skipped: list[SkippedRecord] = []
        for offset in range(min(MAX_CONSECUTIVE_UNREADABLE, records)):
            found = load_or_skip(self.samples, (start + offset) % records)
            if not isinstance(found, SkippedRecord):
                return _LoadedSample(found, skipped)
            skipped.append(found)
        raise InputError(
            f"{len(skipped)} records in a row cannot be read, check the data set; the first is {skipped[0].key}: "
            f"{skipped[0].reason}"
        )


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="samples")


def _until_closed(loading: grain.IterDataset) -> Generator[LoadedBatch, None, None]:
    with closing(iter(loading)) as iterator:
        yield from iterator


def _close_at_exit(generator: Generator) -> None:
    """Has the generator closed when the interpreter exits, if it is still open then: later, closing fails."""

    def close() -> None:
        if (still_open := reference()) is not None:
            still_open.close()

    reference = weakref.ref(generator, lambda _: atexit.unregister(close))
    atexit.register(close)


atexit.register(gc.collect)  # runs last: grain's iterators are in reference cycles with their last shared memory
