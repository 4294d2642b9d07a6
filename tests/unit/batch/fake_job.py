"""A job whose images are 2 x 2 pixels that say the seed; as a program, one that tests kill. Knows nothing of jax.

python fake_job.py OUT LOG SECONDS: makes 40 rows x 2 in batches of 4 that take SECONDS each, and writes the name of
every image that it makes to LOG.
"""

import io
import sys
import time
import types
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # without the package's face, which imports all of it: a start takes 0.2 s in place of 2
    package = types.ModuleType("ipadapter_jax")
    package.__path__ = [str(Path(__file__).resolve().parents[3] / "ipadapter_jax")]
    sys.modules["ipadapter_jax"] = package

from PIL import Image

from ipadapter_jax.batch.plan import ImageTask, plan_tasks
from ipadapter_jax.batch.rows import BatchRow
from ipadapter_jax.batch.runner import BatchProgress, run_job

SETTINGS = {"steps": 20, "sha256": {"unet": {"unet.safetensors": "ab12"}}}
BATCH = 4


def rows(count: int) -> list[BatchRow]:
    """Every third has an image prompt, which nobody reads."""
    images = [(Path(f"images/{i}.png"),) if i % 3 == 0 else () for i in range(count)]
    return [BatchRow(i, i + 2, f"row{i}", f"a fox, number {i}", "", images[i], None, None) for i in range(count)]


def tasks(count: int = 10, num_images: int = 2, shard: tuple[int, int] = (0, 1)) -> list[ImageTask]:
    return plan_tasks(rows(count), num_images=num_images, seed=7, scale=0.5, shard=shard)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("L", (2, 2), seed.to_bytes(4)).save(buffer, "PNG")
    return buffer.getvalue()


def run(planned: list[ImageTask], out: Path, **options: Any) -> BatchProgress:
    options = {
        "settings": SETTINGS,
        "batch_size": BATCH,
        "load": lambda row: row.index,
        "make": lambda batch: [task.seed for task, _ in batch],
        "encode": lambda task, seed: png(seed),
    } | options
    return run_job(planned, out, **options)


def main(out: str, log: str, seconds: str) -> int:
    with open(log, "a", encoding="utf-8", buffering=1) as made:

        def make(batch: list[tuple[ImageTask, int]]) -> list[int]:
            for task, index in batch:
                assert task.row.index == index
                made.write(f"{task.image_name}\n")
            time.sleep(float(seconds))
            return [task.seed for task, _ in batch]

        progress = run(tasks(40), Path(out), make=make)
    assert "jax" not in sys.modules
    return progress.code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
