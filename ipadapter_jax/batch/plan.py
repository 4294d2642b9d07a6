"""Which images a job makes, and in which batches. An image depends on its row alone: a job that is resumed, reordered
or divided among processes makes the same images."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ipadapter_jax.batch.rows import BatchRow

Content = TypeVar("Content")


@dataclass(frozen=True, slots=True)
class ImageTask:
    """One image to make: the name of its file in the job's folder, and the seed and scale that it is made with."""

    row: BatchRow
    image_name: str
    seed: int
    scale: float


def plan_tasks(
    rows: Sequence[BatchRow], *, num_images: int, seed: int, scale: float, shard: tuple[int, int] = (0, 1)
) -> list[ImageTask]:
    """All images of the rows: NAME.png or, with several images per row, NAME-0.png, NAME-1.png and so on.

    Image k of a row has the row's seed + k. A row without a seed has `seed` + a number computed from its name; a row
    without a scale has `scale`. shard: (process, processes) selects the rows whose index mod processes is process.
    """
    process, processes = shard
    tasks = []
    for row in rows:
        if row.index % processes != process:
            continue
        first = seed + _seed_offset(row.name) if row.seed is None else row.seed
        for k in range(num_images):
            image = f"{row.name}.png" if num_images == 1 else f"{row.name}-{k}.png"
            tasks.append(ImageTask(row, image, (first + k) % 2**32, scale if row.scale is None else row.scale))
    return tasks


def batches(
    items: Iterable[tuple[ImageTask, Content]], size: int, shape_key: Callable[[ImageTask, Content], Hashable]
) -> Iterator[list[tuple[ImageTask, Content]]]:
    """Yields batches of `size` items that have the same `shape_key`, in the order of the items. The last batch of each
    key may be smaller. Reads an item when it needs it.
    """
    waiting: dict[Hashable, list[tuple[ImageTask, Content]]] = {}
    for item in items:
        key = shape_key(*item)
        batch = waiting.setdefault(key, [])
        batch.append(item)
        if len(batch) == size:
            yield waiting.pop(key)
    yield from waiting.values()


def count_images(task: ImageTask, content: object) -> int:
    """The number of image prompts of a task's row."""
    return len(task.row.images)


def _seed_offset(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4])
