"""Images and seeds depend on a row alone; batches are uniform."""

import random
from pathlib import Path

import pytest

from ipadapter_jax.batch.plan import ImageTask, batches, count_images, plan_tasks
from ipadapter_jax.batch.rows import BatchRow


def row(index: int, images: int = 0, seed: int | None = None, scale: float | None = None) -> BatchRow:
    paths = tuple(Path(f"{k}.png") for k in range(images))
    return BatchRow(index, index + 2, f"row{index}", "a fox", "", paths, seed, scale)


ROWS = [row(i, images=i % 3, seed=i if i % 5 == 0 else None) for i in range(40)]
OPTIONS = {"num_images": 3, "seed": 11, "scale": 0.5}


def seeds(tasks: list[ImageTask]) -> dict[str, int]:
    assert len({task.image_name for task in tasks}) == len(tasks)
    return {task.image_name: task.seed for task in tasks}


def test_names_seeds_and_scales():
    (one,) = plan_tasks([row(0, seed=5, scale=0.25)], num_images=1, seed=0, scale=1.0)
    assert (one.image_name, one.seed, one.scale) == ("row0.png", 5, 0.25)
    tasks = plan_tasks([row(0, seed=2**32 - 1), row(1)], num_images=2, seed=3, scale=1.0)
    assert [task.image_name for task in tasks] == ["row0-0.png", "row0-1.png", "row1-0.png", "row1-1.png"]
    assert [task.seed for task in tasks[:2]] == [2**32 - 1, 0]
    assert [task.scale for task in tasks] == [1.0] * 4
    # Recorded, so that a later release goes on with the same images: sha256sum of "row1" begins with 33b8a4c2.
    assert [task.seed for task in tasks[2:]] == [0x33B8A4C2 + 3, 0x33B8A4C2 + 4]


def test_another_base_seed_moves_all_but_the_rows_own():
    before, after = seeds(plan_tasks(ROWS, **OPTIONS)), seeds(plan_tasks(ROWS, **(OPTIONS | {"seed": 12})))
    own = {f"row{i}-{k}.png" for i in range(0, 40, 5) for k in range(3)}
    assert {name for name in before if before[name] == after[name]} == own
    assert len(set(before.values())) == len(before)


def test_reordered_split_or_shortened_the_images_are_the_same():
    whole = seeds(plan_tasks(ROWS, **OPTIONS))
    assert seeds(plan_tasks(random.Random(0).sample(ROWS, len(ROWS)), **OPTIONS)) == whole
    parts = [seeds(plan_tasks(ROWS, **OPTIONS, shard=(process, 3))) for process in range(3)]
    assert sum(map(len, parts)) == len(whole) and parts[0] | parts[1] | parts[2] == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= OPTIONS["num_images"]
    # A bad row that one process alone sees (its image is late on a network file system) moves no other row.
    part = seeds(plan_tasks(ROWS[1:], **OPTIONS, shard=(1, 3)))
    assert part == parts[1]


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_batches_are_uniform_and_keep_the_order(size):
    tasks = plan_tasks(ROWS, **OPTIONS)
    found = list(batches(((task, task.image_name) for task in tasks), size, count_images))
    kinds = [{len(task.row.images) for task, _ in batch} for batch in found]
    assert all(len(kind) == 1 for kind in kinds)
    for kind in range(3):
        sizes = [len(batch) for batch, own in zip(found, kinds, strict=True) if own == {kind}]
        assert all(count == size for count in sizes[:-1]) and sizes[-1] <= size
        ordered_map = [task for batch, own in zip(found, kinds, strict=True) if own == {kind} for task, _ in batch]
        assert ordered_map == [task for task in tasks if len(task.row.images) == kind]
    assert all(task.image_name == content for batch in found for task, content in batch)


def test_batches_take_what_they_need():
    tasks = iter([(task, None) for task in plan_tasks(ROWS[::3], **OPTIONS)])
    assert len(next(batches(tasks, 4, count_images))) == 4
    assert next(tasks)[0].image_name == "row3-1.png"
