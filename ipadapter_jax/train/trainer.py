"""A run from its recipe to its adapter file: build, restore, step, log, validate, save, export."""

import contextlib
import logging
from collections.abc import Generator
from pathlib import Path

import jax

from ipadapter_jax.data.loader import LoadedBatch, load_batches
from ipadapter_jax.runtime import malloc
from ipadapter_jax.runtime.compilation_cache import enable_compilation_cache
from ipadapter_jax.runtime.mesh import global_mesh
from ipadapter_jax.runtime.preemption import EXIT_PREEMPTED
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.train.batches import batch_of
from ipadapter_jax.train.build import Run, Variation, build
from ipadapter_jax.train.config import Train, check, check_batch_memory
from ipadapter_jax.train.dataset import open_samples
from ipadapter_jax.train.multihost import barrier, initialize, run_on_all, run_on_first
from ipadapter_jax.train.preemption import CoordinatedShutdown
from ipadapter_jax.train.run_dir import run_lock
from ipadapter_jax.train.sharding import check_batch, global_batch, local_indices, replicate_leaves
from ipadapter_jax.train.state import TrainState
from ipadapter_jax.train.step_outcomes import PendingSteps, UnreadableRecords
from ipadapter_jax.train.unused_options import warn_of_unused_options

log = logging.getLogger("ipadapter_jax")


def train(config: Train, variation: Variation | None = None) -> int:
    """Starts a run or resumes it. Returns 0 when all steps are done, 75 when it was preempted and has saved.

    Raises InputError for settings, data or weights that cannot be used, and when the training diverges.
    """
    check(config)
    warn_of_unused_options(config)
    if malloc.is_cpu_only():
        malloc.disable_trim()
    initialize(config.mesh)
    enable_compilation_cache()
    check_batch_memory(config, jax.process_count())
    mesh, store = global_mesh(config.mesh.fsdp), LocalStore(Path(expand_home(config.out)))
    check_batch(mesh.size, config.data.batch_size, config.optim.accumulate)
    samples = open_samples(config.data.path, config.data, config.model)  # most mistakes show before there is a folder
    with run_lock(store), CoordinatedShutdown() as shutdown, contextlib.ExitStack() as files:
        run, state = build(config, mesh, store, samples, files, variation)
        code = run_steps(run, state, shutdown)
    if jax.process_count() > 1:
        barrier("the end of the run")  # process 0 may still be writing
    return code


def run_steps(run: Run, state: TrainState, shutdown: CoordinatedShutdown) -> int:
    """All remaining steps, or those until a shutdown is requested. Returns the exit code."""
    config, first = run.config, int(state.step)
    if first >= config.steps:
        log.info("all %d steps are done", config.steps)
        _export(run, state, first)  # a kill may have prevented it, or another dtype is wanted
        return 0
    indices = local_indices(run.mesh, config.data.batch_size)
    pending = PendingSteps(run)
    unreadable = UnreadableRecords(run, len(indices))
    if first == 0:
        _validate(run, state, 0)
    with malloc.without_old_objects():
        for number, loaded in enumerate(_batches(run, indices, first), first + 1):
            unreadable.add(number, loaded, pending)
            batch = batch_of(global_batch(run.mesh, loaded.arrays, indices, config.data.batch_size))
            with run.first_call("compiling the training step"):
                state, metrics = run.step(state, run.loaded.frozen, batch)
            pending.add(number, metrics)
            preempted, last = shutdown.should_stop(number), number == config.steps
            if last or _due(number, config.log.validate_every):
                pending.wait()
                _validate(run, state, number)
            if last or preempted or _due(number, config.checkpoint.every):
                pending.wait()
                _save(run, state, number)
            if preempted and not last:
                log.info("preempted: step %d is saved; rerun the same command to resume", number)
                return EXIT_PREEMPTED
    return 0


def _batches(run: Run, indices: list[int], first: int) -> Generator[LoadedBatch, None, None]:
    config = run.config
    return load_batches(
        run.samples,
        seed=config.seed,
        batch_size=config.data.batch_size,
        rows=indices,
        first=first,
        count=config.steps - first,
        workers=config.data.workers,
        threads=config.data.threads,
    )


def _validate(run: Run, state: TrainState, number: int) -> None:
    if run.validation is None:
        return
    reporter, validation, trainable = run.reporter, run.validation, state.averaged_params
    paused = reporter.paused() if reporter is not None else contextlib.nullcontext()
    with paused, run.first_call("compiling the validation and the sampler, and validating"):
        losses, grid = validation.losses(trainable), validation.grid(trainable, number)
        run_on_first(lambda: reporter and reporter.validated(number, losses | grid.scores, grid.image))


def _save(run: Run, state: TrainState, number: int) -> None:
    """Starts to write the checkpoint, which goes on during the next steps, and exports the adapter."""
    run_on_all(lambda: run.checkpoints.save(number, state, run.identity.to_json()))
    _export(run, state, number)
    if malloc.is_cpu_only():
        malloc.trim()


def _export(run: Run, state: TrainState, number: int) -> None:
    replicated = replicate_leaves(state.averaged_params, run.mesh)
    own = jax.tree.map(lambda x: x.addressable_data(0), replicated)
    run_on_first(lambda: run.reporter and run.reporter.export(number, own))


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0
