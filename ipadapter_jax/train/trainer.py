"""A run from its recipe to its adapter file: build, restore, step, log, validate, save, export."""

import contextlib
import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
from jax import Array
from jax.sharding import Mesh

from ipadapter_jax.data.loader import LoadedBatch, SkippedRecord, load_batches
from ipadapter_jax.errors import InputError
from ipadapter_jax.ops import attention_kernels
from ipadapter_jax.runtime import malloc
from ipadapter_jax.runtime.announcements import AnnounceFirstCall, announce
from ipadapter_jax.runtime.compilation_cache import enable_compilation_cache
from ipadapter_jax.runtime.flops import count_flops
from ipadapter_jax.runtime.mesh import batch_sharding, global_mesh, replicated
from ipadapter_jax.runtime.preemption import EXIT_PREEMPTED
from ipadapter_jax.runtime.random_keys import GENERATOR, recorded_generator
from ipadapter_jax.storage.config_diff import diff_configs
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.train.checkpoint import Checkpoints
from ipadapter_jax.train.checksums import tree_checksums, tree_fingerprint
from ipadapter_jax.train.config import Train, check, check_batch_memory, identity
from ipadapter_jax.train.dataset import (
    Samples,
    check_precomputed,
    first_readable_sample,
    log_record_count,
    open_samples,
    precomputed_encoder,
    write_unused_report,
)
from ipadapter_jax.train.memory import MemoryPlan, device_memory_limit, memory_remedies, plan_memory
from ipadapter_jax.train.metrics_log import SkippedRecordLog
from ipadapter_jax.train.multihost import barrier, broadcast_error, initialize, run_on_all, run_on_first
from ipadapter_jax.train.networks import load_networks
from ipadapter_jax.train.optim import make_optimizer, partition, trainable_mask
from ipadapter_jax.train.preemption import CoordinatedShutdown
from ipadapter_jax.train.reporting import Reporter
from ipadapter_jax.train.run_dir import run_lock
from ipadapter_jax.train.sharding import check_batch, global_batch, local_indices, replicate_leaves
from ipadapter_jax.train.state import TrainState, init_train_state, state_shardings
from ipadapter_jax.train.step import make_step
from ipadapter_jax.train.unused_options import warn_of_unused_options
from ipadapter_jax.train.validation import Validation

log = logging.getLogger("ipadapter_jax")

CHECKPOINTS = "checkpoints"  # in the folder of a run
_SURE = 1.25  # the computed memory is right to 13 % beside XLA's own plan
_IN_FLIGHT = 2  # steps given to the devices before the first one's outcome is looked at: they never wait for the host


def train(config: Train) -> int:
    """Begins a run or goes on with it. Returns 0 when all steps are done, 75 when it was told to stop and has saved.

    Raises InputError for what cannot be used, and when the training goes wrong.
    """
    check(config)
    warn_of_unused_options(config)
    if malloc.is_cpu_only():
        malloc.disable_trim()
    initialize(config.mesh)
    enable_compilation_cache()
    check_batch_memory(config, jax.process_count())
    mesh, folder = global_mesh(config.mesh.fsdp), Path(expand_home(config.out))
    check_batch(mesh, config.data.batch_size, config.optim.accumulate)
    samples = open_samples(config, config.data.path)  # the likeliest mistake, found before there is a folder
    with run_lock(folder), CoordinatedShutdown() as stop, contextlib.closing(Run(config, mesh, folder, samples)) as run:
        code = run.go(stop)
    if jax.process_count() > 1:
        barrier("the end of the run")  # process 0 may still be writing, and nobody is to miss it
    return code


class Run:
    """A run at its newest step, with all that it needs."""

    def __init__(self, config: Train, mesh: Mesh, folder: Path, samples: Samples):
        self.config, self.mesh, self.folder, self.samples = config, mesh, folder, samples
        self.first_time = AnnounceFirstCall()
        with announce("reading the weights"):
            self.loaded = load_networks(config, mesh, precomputed_encoder(self.samples))
        check_precomputed(self.samples, config, self.loaded)
        log_record_count(config.data.path, samples)  # now that nothing is wrong with it: an error is to stand alone
        write_unused_report(folder, samples)
        attention_kernels.agree(self.loaded.networks.head_dims, config.model.dtype)
        self.about = self._about()
        keep = config.checkpoint
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, keep_last=keep.keep_last, keep_every=keep.keep_every)
        self._build_state()
        self.rows = local_indices(mesh, config.data.batch_size)
        with announce("tracing the training step"):
            flops = self._check_cost()
        self.validation = self._validation()
        self.skips = run_on_all(
            lambda: SkippedRecordLog(folder / _of_process("skipped", "jsonl"), config.data.max_unreadable_fraction)
        )
        self.desk = run_on_first(lambda: Reporter(config, folder, self.about, self.loaded, self.first, flops))
        self.fault: str | None = None  # of the data that this process reads
        self.pending: deque[tuple[int, dict[str, Array]]] = deque()  # steps whose outcome nobody has looked at

    def _build_state(self) -> None:
        """The state of the newest good checkpoint or the initial one, where it belongs on the mesh, and the step."""
        optimizer = make_optimizer(self.config.optim, trainable_mask(self.config.model))
        trainable = partition(self.loaded.frozen | self.loaded.params, trainable_mask(self.config.model))
        self.loaded = dataclasses.replace(self.loaded, params={})  # from here on they live in the state

        def begin(params: Any) -> TrainState:
            return init_train_state(params, optimizer, self.config)

        template = jax.eval_shape(begin, trainable)
        shardings = state_shardings(self.mesh, template)
        found = self._restored(
            jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), template, shardings)
        )
        self.state = jax.jit(begin, out_shardings=shardings)(trainable) if found is None else found
        self.first = int(self.state.step)

        def step_on(mesh: Mesh) -> Callable:
            return make_step(self.loaded.networks, optimizer, self.config, mesh)

        self.make_step, self.outputs = step_on, (shardings, replicated(self.mesh))

    def _check_cost(self) -> int:
        """The FLOP of a step, over all devices. Raises InputError, before anything runs, when it cannot fit."""
        size, sharding = self.config.data.batch_size, batch_sharding(self.mesh)
        batch = {
            name: jax.ShapeDtypeStruct((size, *array.shape), array.dtype, sharding=sharding)
            for name, array in first_readable_sample(self.samples, 0).items()
        }
        limit = device_memory_limit()
        if limit is not None:
            self._check_memory(batch, limit)
        self.step = jax.jit(self.make_step(self.mesh), donate_argnums=0, out_shardings=self.outputs)
        return count_flops(self.step.trace(self.state, self.loaded.frozen, batch).jaxpr).total()

    def _check_memory(self, batch: dict[str, Any], limit: int) -> None:
        """Computes blocks again in the backward pass where a step would not fit otherwise."""
        needed = self._plan(batch)
        if _SURE * needed.total > limit and self.config.model.remat == "auto":
            networks = self.loaded.networks
            networks = dataclasses.replace(networks, unet=networks.unet.clone(remat=True))
            self.loaded = dataclasses.replace(self.loaded, networks=networks)
            log.info("the UNet's blocks are computed again in the backward pass: they would not fit otherwise")
            needed = self._plan(batch)
        log.info("memory:\n%s", needed.table())
        if needed.total > limit:
            ways = memory_remedies(self.config, self.mesh, live="pixels" in batch)
            numbers = f"about {needed.total / 2**30:.1f} GiB on each device, which has {limit / 2**30:.1f}"
            if needed.total > _SURE * limit:
                raise InputError(f"a step needs {numbers}; use {ways}")
            log.warning("a step may need %s; if it fails, use %s", numbers, ways)

    def _plan(self, batch: dict[str, Any]) -> MemoryPlan:
        return plan_memory(self.make_step, self.mesh, self.state, self.loaded.frozen, batch)

    def _about(self) -> dict[str, Any]:
        """What a resumed run must share with the run before it: settings, data, frozen weights, random generator."""
        frozen = {part: tree_fingerprint(tree_checksums(tree)) for part, tree in self.loaded.frozen.items()}
        return {
            "settings": identity(self.config),
            "data": self.samples.identity(),
            "frozen weights": frozen,
            "generator": GENERATOR,
        }

    def _restored(self, template: TrainState) -> TrainState | None:
        """The newest good checkpoint. Raises InputError when it was made with other settings, data or weights."""
        before = self.checkpoints.about()
        if before is None:
            return None
        changed = diff_configs(before | {"generator": recorded_generator(before)}, self.about)
        if changed:
            raise InputError(
                f"{self.folder} holds a run that began differently: {'; '.join(changed[:8])}; go on with what it began "
                "with, or choose another --out"
            )
        found = self.checkpoints.restore(template)
        if found is None:
            return None
        log.info("going on from step %d", found[0])
        return found[1]

    def _validation(self) -> Validation | None:
        path = self.config.log.validation_path
        if not self.config.log.validate_every:
            return None
        samples = self.samples
        if path is not None:
            samples = open_samples(self.config, path)
            log_record_count(path, samples)
            check_precomputed(samples, self.config, self.loaded)
        with self.first_time("compiling the encoders and encoding the validation batch"):
            return Validation(self.config, self.mesh, self.loaded, samples)

    def go(self, stop: CoordinatedShutdown) -> int:
        """All steps that are left, or those until the signal. Returns the exit code."""
        config = self.config
        if self.first >= config.steps:
            log.info("all %d steps are done", config.steps)
            self._export(self.first)  # which a kill may have cut off, or which is wanted in another dtype
            return 0
        loading = load_batches(
            self.samples,
            seed=config.seed,
            batch_size=config.data.batch_size,
            rows=self.rows,
            first=self.first,
            count=config.steps - self.first,
            workers=config.data.workers,
            threads=config.data.threads,
        )
        if self.first == 0:
            self._validate(0)
        with malloc.without_old_objects():
            return self._steps(loading, stop)

    def _steps(self, loading: Iterator[LoadedBatch], stop: CoordinatedShutdown) -> int:
        config = self.config
        for number, (arrays, skipped) in enumerate(loading, self.first + 1):
            self._count_bad(number, skipped)
            batch = global_batch(self.mesh, arrays, self.rows, config.data.batch_size)
            with self.first_time("compiling the training step"):
                self.state, metrics = self.step(self.state, self.loaded.frozen, batch)
            self.pending.append((number, metrics))
            self._look(_IN_FLIGHT)
            stopping, last = stop.should_stop(number), number == config.steps
            if last or _due(number, config.log.validate_every):
                self._validate(number)
            if last or stopping or _due(number, config.checkpoint.every):
                self._save(number)
            if stopping and not last:
                log.info("told to stop: step %d is saved, the same command goes on from there", number)
                return EXIT_PREEMPTED
        return 0

    def _look(self, in_flight: int) -> None:
        """Waits until at most `in_flight` steps are unfinished, and logs what has come out of the others."""
        while len(self.pending) > in_flight:
            number, metrics = self.pending.popleft()
            bad = int(metrics["bad_steps"])
            if bad >= self.config.optim.max_nonfinite_steps:
                raise InputError(
                    f"the gradients of {bad} steps in a row, up to step {number}, were not finite; {self.folder} holds "
                    "the last good weights: begin another run from them (--model.init-from) with a lower "
                    "--optim.learning-rate, with --optim.clip-norm, or in bfloat16 or float32"
                )
            if self.desk is not None:
                self.desk.step(number, metrics, bad_records=self.skips.bad)

    def _validate(self, number: int) -> None:
        self._look(0)
        if self.validation is None:
            return
        validation, trainable = self.validation, self.state.params if self.state.ema is None else self.state.ema
        paused = self.desk.paused() if self.desk is not None else contextlib.nullcontext()
        with paused, self.first_time("compiling the validation and the sampler, and validating"):
            losses, (grid, scores) = validation.losses(trainable), validation.grid(trainable, number)
            run_on_first(lambda: cast(Reporter, self.desk).validated(number, losses | scores, grid))

    def _save(self, number: int) -> None:
        """The checkpoint, which is written while training goes on, and the file for everybody else."""
        self._look(0)
        run_on_all(lambda: self.checkpoints.save(number, self.state, self.about))
        self._export(number)
        if malloc.is_cpu_only():
            malloc.trim()

    def _export(self, number: int) -> None:
        trainable = replicate_leaves(self.state.params if self.state.ema is None else self.state.ema, self.mesh)
        own = jax.tree.map(lambda x: x.addressable_data(0), trainable)
        run_on_first(lambda: cast(Reporter, self.desk).export(number, own))

    def _count_bad(self, number: int, skipped: list[SkippedRecord]) -> None:
        """Raises InputError when there are too many, in all processes at the same step."""
        try:
            self.skips.add(len(self.rows), skipped)
        except InputError as error:
            self.fault = str(error)
        if jax.process_count() > 1 and not _due(number, self.config.log.every):
            return
        if jax.process_count() > 1:
            self._look(0)  # one program with collectives at a time
        if problem := broadcast_error(self.fault):
            raise InputError(problem)

    def close(self) -> None:
        """Waits for the checkpoint that is being written."""
        try:
            self.checkpoints.close()
        finally:
            self.skips.close()
            if self.desk is not None:
                self.desk.close()


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _of_process(stem: str, suffix: str) -> str:
    """Process 0 writes stem.suffix, another one stem-number.suffix."""
    own = f"-{jax.process_index()}" if jax.process_index() else ""
    return f"{stem}{own}.{suffix}"
