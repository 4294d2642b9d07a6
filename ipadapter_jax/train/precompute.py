"""Encodes a data set once with the frozen VAE and image encoder: `ipadapter-jax encode`.

A shard depends on the data, the encoders and the settings alone. Whole shards are what an interrupted run leaves, and
what the next one resumes from; the processes of a job take every P-th shard and need nothing of one another.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import tqdm

from ipadapter_jax.data.dataset import LiveSamples
from ipadapter_jax.data.feature_cache import CachedSamples, finish_cache, is_cache, start_cache
from ipadapter_jax.data.feature_shards import CachePlan, SampleLayout, ShardWriter, read_shard_footer
from ipadapter_jax.data.file_listing import check_exists
from ipadapter_jax.data.loader import SkippedRecord, load_or_skip
from ipadapter_jax.data.open_dataset import open_dataset
from ipadapter_jax.data.unused_files import write_report
from ipadapter_jax.errors import InputError
from ipadapter_jax.runtime.announcements import AnnounceFirstCall, announce
from ipadapter_jax.runtime.compilation_cache import enable_compilation_cache
from ipadapter_jax.runtime.memory_limits import check_memory
from ipadapter_jax.runtime.prefetch import ordered_map
from ipadapter_jax.storage.atomic_files import sha256
from ipadapter_jax.storage.config_diff import diff_configs
from ipadapter_jax.storage.paths import check_utf8, expand_home
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.train.config import Mesh
from ipadapter_jax.train.frozen_encoders import EncodedImages, FrozenEncoders, load_frozen_encoders
from ipadapter_jax.train.multihost import barrier, initialize
from ipadapter_jax.train.precompute_config import PrecomputeConfig
from ipadapter_jax.train.run_dir import run_lock
from ipadapter_jax.weights.dtype_cast import all_finite
from ipadapter_jax.weights.formats.shard_index import files_of
from ipadapter_jax.weights.hub import found_place
from ipadapter_jax.weights.tokenizer_files import vocabulary_files

log = logging.getLogger("ipadapter_jax")

_ENOUGH = 200  # records before a fraction of them is meaningful

Row = dict[str, np.ndarray] | SkippedRecord


def precompute(config: PrecomputeConfig) -> int | None:
    """Writes all of it, or this process's part. Returns how many records could not be used; None in
    other processes than 0. Raises InputError for what cannot be used, and when there is no more room."""
    _check(config)
    initialize(Mesh())
    enable_compilation_cache()
    with run_lock(LocalStore(config.out)):
        return precompute_shards(config, jax.process_index(), jax.process_count())


def precompute_shards(config: PrecomputeConfig, process: int, processes: int) -> int | None:
    """Writes the missing ones of the shards process, process + processes, ...; completes the folder if all are there,
    and then returns the number of skipped records."""
    job, store = _job(config), LocalStore(config.out)
    if changed := diff_configs(start_cache(store, job.plan).to_json(), job.plan.to_json()):
        raise InputError(
            f"{config.out} was started with other settings or data ({'; '.join(changed[:8])}); resume with those, or "
            "choose another --out"
        )
    footers = [read_shard_footer(store, job.plan, shard) for shard in range(job.plan.shards)]
    missing = [shard for shard, found in enumerate(footers) if found is None]
    _check_room(config.out, job.plan, missing)
    if process == 0:
        log.info("%s: %s", config.data, job.samples.account())
        write_report(store, job.samples.source.unused)
    skipped = [entry for found in footers if found for entry in found.skipped]
    done = sum(len(job.plan.shard_records(shard)) for shard, found in enumerate(footers) if found)
    job.write([shard for shard in missing if shard % processes == process], done, skipped)
    if jax.process_count() > 1:
        barrier("encoded")
    if jax.process_index():
        return None
    count = finish_cache(store, job.plan, _zero_features(job))
    if count is None and process == jax.process_index() and processes == jax.process_count():
        raise InputError(f"{config.out}: some shards are not to be seen here; run the same command on all hosts again")
    return count


def _zero_features(job: "_Job") -> np.ndarray | None:
    """What a dropped image is. Raises InputError where that is not finite."""
    found = job.encoders.zero_features()
    if found is not None and not all_finite(found):
        raise InputError(
            f"the features of zero pixels are not finite in {job.config.dtype}; encode with another --dtype"
        )
    return found


def check_cache(
    cache: CachedSamples,
    *,
    vae: Path,
    tokenizer: Path,
    resolution: int,
    features: str | None,
    image_encoder: Path | None,
) -> None:
    """Holds a cache against what a run needs: its VAE's weight file, its tokenizer's folder, the side of its images,
    "pooled" or "penultimate", None where it reads no features, and its image encoder's weight file, None where that is
    not here. Raises InputError listing what differs."""
    made = dict(cache.plan.made_from)
    made["image_encoder"] = made["image_encoder"]["sha256"]
    names = ["vae", "tokenizer", "resolution"]
    names += ["features"] if features else []
    names += ["image_encoder"] if image_encoder else []
    needed = {
        "image_encoder": _digests(image_encoder) if image_encoder else None,
        "vae": _digests(vae),
        "tokenizer": {
            name: sha256(file)
            for name, file in vocabulary_files(tokenizer).items()
            if name in made["tokenizer"] or name == "added_tokens.json"  # without which tokens are other ones
        },
        "resolution": resolution,
        "features": features,
    }
    if changed := diff_configs({name: made[name] for name in names}, {name: needed[name] for name in names}):
        raise InputError(
            f"{cache.store} was encoded for another run than this ({'; '.join(changed)}): encode the data again, or "
            "change the run's settings"
        )


def _digests(source: Path) -> list[str]:
    """The sha256 of a network's weight files."""
    return [sha256(file) for file in files_of(source)]


@dataclasses.dataclass(frozen=True)
class _Job:
    config: PrecomputeConfig
    encoders: FrozenEncoders
    samples: LiveSamples
    plan: CachePlan

    def write(self, shards: Sequence[int], done: int, skipped: list[dict]) -> None:
        """Writes shards. So many records are done by now, of which some were skipped."""
        config, parts = self.config, [self.plan.shard_records(shard) for shard in shards]
        ahead = 2 * config.batch_size * self.encoders.mesh.size
        records, load = itertools.chain.from_iterable(parts), functools.partial(load_or_skip, self.samples)
        rows = ordered_map(load, records, threads=config.threads, ahead=ahead)
        total, first_time = sum(map(len, parts)), AnnounceFirstCall()
        with contextlib.closing(rows), tqdm.tqdm(total=total, desc="encoding", unit="sample", disable=None) as bar:
            for shard, part in zip(shards, parts, strict=True):
                with ShardWriter(LocalStore(config.out), self.plan, shard) as writer:
                    for row in self._encoded(part, rows, first_time):
                        if isinstance(row, SkippedRecord):
                            writer.skip(*row)
                        else:
                            writer.add(row)
                        bar.update()
                done, skipped = done + len(part), skipped + writer.skipped
                self._check_fraction(done, skipped)

    def _check_fraction(self, done: int, skipped: list[dict]) -> None:
        if done >= min(_ENOUGH, len(self.samples)) and len(skipped) > self.config.max_unreadable_fraction * done:
            raise InputError(
                f"{len(skipped)} of {done} records cannot be used, {skipped[-1]['key']} for one: "
                f"{skipped[-1]['reason']}; repair the data, or raise "
                "--max-unreadable-fraction and run the same command again"
            )

    def _encoded(self, part: range, rows: Iterator[Row], first_time: AnnounceFirstCall) -> Iterator[Row]:
        """What the encoders make of the records `part`, which come next in `rows`; a batch is computed while the one
        before it is written."""
        size, before = self.config.batch_size * self.encoders.mesh.size, None
        for start in range(0, len(part), size):
            indices = part[start : start + size]
            group = list(itertools.islice(rows, len(indices)))
            sides = {"pixels": self.config.resolution, "clip_pixels": self.encoders.clip_size}
            batch = [_stacked(group, name, (size, side, side, 3)) for name, side in sides.items()]
            with first_time("compiling the encoders"):
                now = indices, group, self.encoders(*batch)
            if before is not None:
                yield from self._unstacked(*before)
            before = now
        if before is not None:
            yield from self._unstacked(*before)

    def _unstacked(self, indices: Sequence[int], rows: Sequence[Row], encoded: EncodedImages) -> Iterator[Row]:
        arrays = {name: np.asarray(array) for name, array in encoded._asdict().items()}
        finite = arrays.pop("finite")
        for i, (index, row) in enumerate(zip(indices, rows, strict=True)):
            if isinstance(row, SkippedRecord):
                yield row
            elif not finite[i]:
                reason = f"its latents or features are not finite in {self.config.dtype}; try another --dtype"
                yield SkippedRecord(index, self.samples.key(index), reason)
            else:
                yield {name: array[i] for name, array in arrays.items()} | {"input_ids": row["input_ids"]}


def _job(config: PrecomputeConfig) -> _Job:
    """Opens data and encoders, and says what is to be written."""
    patches = config.features == "penultimate"
    with announce("reading the weights"):
        encoders = load_frozen_encoders(config.model, config.variant, config.image_encoder, config.dtype, patches)
    if config.resolution % encoders.pixel_step:
        raise InputError(f"--resolution {config.resolution} must be a multiple of {encoders.pixel_step} for this model")
    columns = {name: getattr(config, name) for name in ("image_root", "image_column", "text_column")}
    source = open_dataset(config.data, cond_image_column=config.cond_image_column, **columns)
    samples = LiveSamples(source, encoders.tokenizer, config.resolution, encoders.clip_size, encoders.text_length)
    shapes = encoders.shapes(config.resolution)._asdict()
    arrays = {name: (np.dtype(x.dtype), x.shape[1:]) for name, x in shapes.items() if name != "finite"}
    arrays["input_ids"] = (np.dtype(np.int32), (samples.text_length,))
    vision = encoders.image_encoder
    made_from = samples.identity() | {
        "features": config.features,
        "dtype": config.dtype,
        "vae": _digests(encoders.vae.source),
        "image_encoder": {
            "sha256": _digests(vision.source),
            "config": dataclasses.asdict(vision.module.config),
        },
    }
    plan = CachePlan(len(samples), config.shard_records, SampleLayout(arrays), json.loads(json.dumps(made_from)))
    return _Job(config, encoders, samples, plan)


def _stacked(rows: Sequence[Row], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A batch, with zeros where a sample is missing: every batch has one shape, so that one program serves all."""
    batch = np.zeros(shape, np.uint8)
    for place, row in zip(batch, rows, strict=False):
        if not isinstance(row, SkippedRecord):
            place[:] = row[name]
    return batch


def _check_room(folder: Path, plan: CachePlan, shards: Sequence[int]) -> None:
    """Raises InputError when the shards that are missing will not fit."""
    records = sum(len(plan.shard_records(shard)) for shard in shards)
    needed = records * (plan.layout.size + 128) + len(shards) * (1 << 17)  # ArrayRecord's headers, index and footer
    free = shutil.disk_usage(folder).free
    if 0 < free < needed:  # some network file systems say 0
        raise InputError(
            f"{folder}: {records} samples need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there; make room "
            "or choose another --out"
        )


def _check(config: PrecomputeConfig) -> None:
    for name in ("resolution", "batch_size", "threads", "shard_records"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at least 1")
    needed = 3 * config.resolution**2 * config.batch_size * 3  # two batches are read ahead of the one that is computed
    what = f"batches of {config.batch_size:,} images of {config.resolution} pixels"
    check_memory(needed, what, "give a smaller --resolution or --batch-size")
    if not 0 <= config.max_unreadable_fraction <= 1:
        raise InputError(f"--max-unreadable-fraction {config.max_unreadable_fraction} must lie between 0 and 1")
    found_place(config.model, "base model")
    check_exists(config.data)
    check_utf8(config.out, "the format of the features")
    data = Path(expand_home(config.data))
    if is_cache(LocalStore(data)):
        raise InputError(f"--data {data} is encoded already; name the images")
    if config.out.resolve().is_relative_to(data.resolve()):
        raise InputError(f"--out {config.out} lies in the data: choose a folder outside of {data}")
