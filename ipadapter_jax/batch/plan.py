"""Which images a job makes, and in which batches. An image depends on its row alone, so that a job that goes on, is
reordered or is split among processes makes the same ones."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ipadapter_jax.batch.rows import Row

Content = TypeVar("Content")


@dataclass(frozen=True, slots=True)
class ImageTask:
    """One image to make: `image` is its file in the folder of the job, seed and scale are those to use."""

    row: Row
    image: str
    seed: int
    scale: float


def plan(
    rows: Sequence[Row], *, num_images: int, seed: int, scale: float, shard: tuple[int, int] = (0, 1)
) -> list[ImageTask]:
    """All images of the rows: NAME.png or, with several to a row, NAME-0.png, NAME-1.png and so on.

    Image k of a row has the row's seed + k. A row without one has `seed` + a number that comes from its name; one
    without a scale has `scale`. shard: (process, processes) leaves the rows of this process: index mod processes.
    """
    process, processes = shard
    works = []
    for row in rows:
        if row.index % processes != process:
            continue
        first = seed + _number_of(row.name) if row.seed is None else row.seed
        for k in range(num_images):
            image = f"{row.name}.png" if num_images == 1 else f"{row.name}-{k}.png"
            works.append(ImageTask(row, image, (first + k) % 2**32, scale if row.scale is None else row.scale))
    return works


def batches(
    items: Iterable[tuple[ImageTask, Content]], size: int, kind: Callable[[ImageTask, Content], Hashable]
) -> Iterator[list[tuple[ImageTask, Content]]]:
    """Batches of `size`, all of one `kind`: one shape each. The last batch of each kind may be smaller; whoever wants
    one shape for all fills it up. The order is kept among the rows of a kind.

    Lazy: takes an item when it needs it.
    """
    waiting: dict[Hashable, list[tuple[ImageTask, Content]]] = {}
    for item in items:
        own = kind(*item)
        batch = waiting.setdefault(own, [])
        batch.append(item)
        if len(batch) == size:
            yield waiting.pop(own)
    yield from waiting.values()


def by_images(work: ImageTask, content: object) -> int:
    """The kind of a row: how many image prompts it has."""
    return len(work.row.images)


def _number_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4])
