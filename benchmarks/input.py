"""The rate at which training gets its batches here: images from tar shards, and samples from a feature cache.

    python -m benchmarks.input
    python -m benchmarks.input --workers 2 --threads 2

The tars hold JPEGs of 640 x 512 and 512 x 640 pixels at quality 90: crops of the photographs in scikit-image. Each is
decoded once, cropped to 512 x 512 for the VAE and resized to 224 x 224 for the image encoder; its caption becomes token
ids. The cache holds what `ipadapter-jax encode` writes for SD 1.5 in float16. All files are read from the page cache
(they have just been written), so this measures the processors. Trust it only on an idle machine; on a busy one, the
processor time of a sample, measured without workers, is more reliable.
"""

import io
import os
import statistics
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from ipadapter_jax.data.dataset import LiveSamples
from ipadapter_jax.data.feature_cache import CachedSamples, finish_cache, start_cache
from ipadapter_jax.data.feature_shards import CachePlan, SampleLayout, ShardWriter
from ipadapter_jax.data.file_listing import find_files
from ipadapter_jax.data.formats.tar import TarSource
from ipadapter_jax.data.loader import SampleSource, load_batches
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.testing.random_weights import write_tokenizer

PHOTOGRAPHS = ("astronaut", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
WORDS = ("a", "photograph", "of", "an", "old", "stone", "bridge", "over", "the", "river", "with", "people", "walking")
ENCODED = {"mean": (64, 64, 4), "logvar": (64, 64, 4), "features": (1024,)}  # float16


@dataclass(frozen=True)
class Settings:
    workers: int = 0
    """Processes that load; 0 loads in this one."""
    threads: int = 8
    """Threads of every process that loads."""
    batch: int = 64
    """Rows of a batch."""
    records: int = 1024
    """Images in the tars; the cache has four times as many samples."""
    runs: int = 3
    """Of which the median is shown."""


def photograph(rng: np.random.Generator) -> Image.Image:
    """A piece of 640 x 512 or 512 x 640 pixels, no more enlarged than it takes to be cut out."""
    from skimage import data

    image = Image.fromarray(getattr(data, rng.choice(PHOTOGRAPHS))())
    width, height = (640, 512) if rng.random() < 0.5 else (512, 640)
    factor = max(width / image.width, height / image.height) * rng.uniform(1, 1.2)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    left = int(rng.integers(0, image.width - width, endpoint=True))
    top = int(rng.integers(0, image.height - height, endpoint=True))
    return image.crop((left, top, left + width, top + height))


def write_tars(folder: Path, records: int) -> float:
    """Shards as of img2dataset; returns the mean size of an image in kB."""
    folder.mkdir()
    rng, total = np.random.default_rng(0), 0
    for shard in range(4):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, records, 4):
                jpeg = io.BytesIO()
                photograph(rng).save(jpeg, "JPEG", quality=90)
                total += len(jpeg.getvalue())
                caption = " ".join(rng.choice(WORDS, 14))
                for suffix, content in (("jpg", jpeg.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return total / records / 1000


def write_cache(folder: Path, records: int) -> None:
    arrays = {name: (np.dtype(np.float16), shape) for name, shape in ENCODED.items()}
    layout = SampleLayout(arrays | {"input_ids": (np.dtype(np.int32), (77,))})
    plan = CachePlan(records, records_per_shard=max(1, records // 4), layout=layout, made_from={})
    folder.mkdir()
    start_cache(LocalStore(folder), plan)
    rng = np.random.default_rng(0)
    for shard in range(plan.shards):
        with ShardWriter(LocalStore(folder), plan, shard) as writer:
            for _ in plan.shard_records(shard):
                floats = {name: rng.integers(0, 99, shape).astype(np.float16) for name, shape in ENCODED.items()}
                writer.add(floats | {"input_ids": np.zeros(77, np.int32)})
    finish_cache(LocalStore(folder), plan, None)


def rate(samples: SampleSource, settings: Settings, count: int) -> tuple[float, float]:
    """Samples per second of `count` batches amid others: what is loaded ahead is so at the beginning and at the end.
    And the processor seconds that this process spends on a sample."""
    margin = 4 + 6 * settings.workers
    loading = load_batches(
        samples,
        seed=0,
        batch_size=settings.batch,
        rows=range(settings.batch),
        first=0,
        count=count + 2 * margin,
        workers=settings.workers,
        threads=settings.threads,
    )
    for _ in range(margin):
        next(loading)
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(loading)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    loading.close()
    return count * settings.batch / seconds, busy / count / settings.batch


def show(what: str, samples: SampleSource, settings: Settings, count: int) -> None:
    rates, busy = zip(*(rate(samples, settings, count) for _ in range(settings.runs)), strict=True)
    each = ", ".join(f"{r:,.0f}" for r in rates)
    print(f"{what}: {statistics.median(rates):,.0f} samples/s, the median of {each}", end="; ")
    print(f"{1000 * statistics.median(busy):.2f} ms of this process each", flush=True)


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_tars(folder / "tars", settings.records)
        write_cache(folder / "cache", 4 * settings.records)
        write_tokenizer(folder / "tokenizer", 49408)
        load = os.getloadavg()[0]
        print(
            f"{len(os.sched_getaffinity(0))} processors, load {load:.1f} before; workers {settings.workers}, threads "
            f"{settings.threads}, batches of {settings.batch}"
        )
        live = LiveSamples(TarSource(find_files(str(folder / "tars"))), folder / "tokenizer", 512, 224)
        show(f"tars of JPEGs, {size:.0f} kB each", live, settings, count=20)
        show("cache, float16", CachedSamples(LocalStore(folder / "cache")), settings, count=200)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
