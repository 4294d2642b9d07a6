"""NaN and infinity: in a sample, from a learning rate that is too high, from float16."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from ipadapter_jax.data.feature_cache import CachedSamples, finish_cache, start_cache
from ipadapter_jax.data.feature_shards import ShardWriter
from ipadapter_jax.data.shuffle import record_order
from ipadapter_jax.runtime.mesh import global_mesh
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.train.build import build
from ipadapter_jax.train.checkpoint import Checkpoints
from ipadapter_jax.train.checksums import tree_checksums
from ipadapter_jax.train.config import Train
from ipadapter_jax.train.dataset import open_samples
from ipadapter_jax.train.export import ADAPTER
from ipadapter_jax.train.precompute import PrecomputeConfig, precompute
from ipadapter_jax.train.preemption import CoordinatedShutdown
from ipadapter_jax.train.run_dir import CHECKPOINTS
from ipadapter_jax.train.trainer import run_steps
from ipadapter_jax.weights.ip_adapter_file import open_ip_adapter
from tests.fault_injection.runs import changed, hold, logged, prepare, quiet, refusal, run_here

_IN_A_ROW = 3


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Samples with NaN, infinity or more than float16 holds, and learning rates that are too high: such a step is
    skipped and counted, and changes no weight and no moment; frozen weights are the same to the bit; after so many in a
    row the run stops with advice; nothing that is not finite is saved or exported."""

    steps: int = 12
    rates: tuple[float, ...] = (1e30, 1e39)
    """Learning rates: weights beyond use, and beyond float32."""

    def __call__(self, work: Path) -> str:
        config = prepare(work, self.steps, save_every=1)
        config = changed(config, data__batch_size=4, checkpoint__keep_last=self.steps)
        cache = _encoded(config, work / "cache")
        skipped = 0
        for dtype, bad in (("float32", {5: np.nan, 11: np.inf}), ("float16", {5: 1e8, 11: -1e8})):
            poisoned = _poisoned(cache, work / f"poisoned-{dtype}", bad)
            own = changed(config, model__dtype=dtype, data__path=str(poisoned), out=str(work / dtype))
            skipped += self._skips(own, bad)
        for rate in self.rates:
            own = changed(
                config, optim__learning_rate=rate, optim__max_nonfinite_steps=_IN_A_ROW, out=str(work / f"{rate}")
            )
            said = refusal(lambda own=own: run_here(changed(own, steps=100)))
            hold(f"{_IN_A_ROW} steps in a row" in said and "learning-rate" in said, said)
            _hold_finite(Path(own.out))
        return (
            f"{skipped} of {2 * self.steps} steps skipped, each with a bad sample and no other; {len(self.rates)} "
            f"learning rates stopped after {_IN_A_ROW} in a row; frozen weights unchanged, nothing saved that is not "
            "finite"
        )

    def _skips(self, config: Train, bad: dict[int, float]) -> int:
        """Steps that were skipped, which are those that read a bad sample."""
        out, size = Path(config.out), config.data.batch_size
        frozen = _frozen_before_and_after(config)
        hold(frozen[0] == frozen[1], "frozen weights have changed")
        records, count = 24, 0
        counts, moments = logged(out, "bad_steps"), {step: _learnt(out, step) for step in range(1, self.steps + 1)}
        in_a_row = 0
        for step in range(1, self.steps + 1):
            rows = range((step - 1) * size, step * size)
            poisoned = any(record_order(config.seed, records, row) in bad for row in rows)
            in_a_row = in_a_row + 1 if poisoned else 0
            hold(counts[step] == in_a_row, f"step {step} counts {counts[step]} bad steps in a row, not {in_a_row}")
            if step > 1:
                hold((moments[step] == moments[step - 1]) == poisoned, f"step {step}: learnt {poisoned=}")
            count += poisoned
        if config.model.dtype == "float16":
            scales = logged(out, "loss_scale")
            hold(scales[self.steps] == 2.0**15 / 2**count, f"{count} overflows, and a loss scale of {scales}")
        _hold_finite(out)
        return count


def _encoded(config: Train, out: Path) -> Path:
    model = config.model
    settings = PrecomputeConfig(
        model.base, model.image_encoder, config.data.path, out, resolution=config.data.resolution
    )
    with quiet():
        precompute(dataclasses.replace(settings, dtype="float32"))
    return out


def _poisoned(cache: Path, out: Path, bad: dict[int, float]) -> Path:
    """A cache with other latents for some records."""
    samples = CachedSamples(LocalStore(cache))
    start_cache(LocalStore(out), samples.plan)
    with ShardWriter(LocalStore(out), samples.plan, 0) as writer:
        for index in range(len(samples)):
            sample = dict(samples[index])
            if index in bad:
                sample["mean"] = np.full_like(sample["mean"], bad[index])
            writer.add(sample)
    finish_cache(LocalStore(out), samples.plan, samples.zero_features())
    return out


def _frozen_before_and_after(config: Train) -> list[dict[str, str]]:
    samples = open_samples(config.data.path, config.data, config.model)
    with quiet(), contextlib.ExitStack() as files:
        run, state = build(config, global_mesh(), LocalStore(Path(config.out)), samples, files)
        before = tree_checksums(run.loaded.frozen)
        with CoordinatedShutdown() as stop:
            run_steps(run, state, stop)
        return [before, tree_checksums(run.loaded.frozen)]


def _learnt(out: Path, step: int) -> dict[str, str]:
    """Digests of weights and moments after a step."""
    manifest = json.loads((out / CHECKPOINTS / str(step) / "manifest" / "metadata").read_text())
    return {name: value for name, value in manifest["leaves"].items() if name.startswith(("params/", "opt_state/"))}


def _hold_finite(out: Path) -> None:
    """Of all that was saved and exported."""
    with contextlib.closing(Checkpoints(out / CHECKPOINTS, read_only=True)) as checkpoints:
        steps = [int(path.name) for path in (out / CHECKPOINTS).iterdir() if path.name.isdecimal()]
        for step in steps:
            found: Any = checkpoints.leaves(step)
            wrong = [name for name, leaf in found[1].items() if not np.isfinite(np.asarray(leaf)).all()]
            hold(not wrong, f"{out.name}: step {step} was saved with {wrong[:3]} not finite")
    for name, tensor in open_ip_adapter(out / ADAPTER).tensors.items():
        hold(bool(np.isfinite(tensor.read()).all()), f"{out.name}: {name} was exported and is not finite")
