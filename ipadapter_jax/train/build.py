"""All that a run needs before its first step: networks, restored state, compiled-to-be step, validation, files."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from ipadapter_jax.errors import InputError
from ipadapter_jax.ops import attention_kernels
from ipadapter_jax.runtime.announcements import AnnounceFirstCall, announce
from ipadapter_jax.runtime.flops import count_flops
from ipadapter_jax.runtime.mesh import batch_sharding, replicated
from ipadapter_jax.storage.store import Store
from ipadapter_jax.train.batches import EncodedBatch, TrainBatch, batch_of
from ipadapter_jax.train.checkpoint import Checkpoints
from ipadapter_jax.train.config import Train
from ipadapter_jax.train.dataset import (
    Samples,
    check_precomputed,
    first_readable_sample,
    log_record_count,
    open_samples,
    precomputed_encoder,
    write_unused_report,
)
from ipadapter_jax.train.memory import device_memory_limit, memory_remedies, plan_memory
from ipadapter_jax.train.metrics_log import SkippedRecordLog
from ipadapter_jax.train.multihost import run_on_all, run_on_first
from ipadapter_jax.train.networks import LoadedNetworks, Networks, load_networks
from ipadapter_jax.train.optim import Partitioned, make_optimizer, partition, trainable_mask
from ipadapter_jax.train.reporting import Reporter
from ipadapter_jax.train.run_dir import CHECKPOINTS
from ipadapter_jax.train.run_identity import RunIdentity, run_identity
from ipadapter_jax.train.state import TrainState, init_train_state, state_shardings
from ipadapter_jax.train.step import Step, StepResult, make_step
from ipadapter_jax.train.validation import Validation

log = logging.getLogger("ipadapter_jax")

_MEMORY_MARGIN = 1.25  # the computed memory is within 13 % of XLA's own plan


class Variation(NamedTuple):
    """What an experiment trains in place of an IP-Adapter: other networks, and what its checkpoints record of that."""

    networks: Callable[[Networks], Networks]
    identity: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run:
    """What stays the same from the first step of a run to its last."""

    config: Train
    mesh: Mesh
    samples: Samples
    loaded: LoadedNetworks  # without trainable parameters, which the state holds
    step: Step  # jitted; donates the state
    identity: RunIdentity
    checkpoints: Checkpoints
    validation: Validation | None
    skipped: SkippedRecordLog
    reporter: Reporter | None  # in process 0
    first_call: AnnounceFirstCall


class Started(NamedTuple):
    """A run and the state that it starts or resumes with."""

    run: Run
    state: TrainState


def build(
    config: Train,
    mesh: Mesh,
    store: Store,
    samples: Samples,
    files: contextlib.ExitStack,
    variation: Variation | None = None,
) -> Started:
    """Reads the weights, restores the newest good checkpoint, and traces the step. `files` closes what is opened.

    Raises InputError for weights, data or a folder that do not fit the settings, and for a step that cannot fit into
    the devices' memory. All processes of the run call this together.
    """
    first_call = AnnounceFirstCall()
    with announce("reading the weights"):
        loaded = load_networks(config, mesh, precomputed_encoder(samples))
    _check_data(samples, loaded, config)
    log_record_count(config.data.path, samples)  # after the checks, so that an error stands alone
    write_unused_report(store, samples)
    attention_kernels.agree(loaded.networks.head_dims, config.model.dtype)
    if variation is not None:
        loaded = dataclasses.replace(loaded, networks=variation.networks(loaded.networks))
    own = run_identity(config, samples, loaded.frozen, None if variation is None else variation.identity)
    keep = config.checkpoint
    checkpoints = files.enter_context(
        contextlib.closing(
            Checkpoints(store.path(CHECKPOINTS), keep_last=keep.keep_last, keep_every=keep.keep_every),
        )
    )
    state = _restored_or_initial(config, mesh, loaded, checkpoints, own, store)
    loaded = dataclasses.replace(loaded, params={})  # from here on they live in the state
    with announce("tracing the training step"):
        loaded, step, flops = _traced_step(config, mesh, loaded, samples, state)
    validation = _validation(config, mesh, loaded, samples, first_call)
    skipped = run_on_all(
        lambda: SkippedRecordLog(store, _name_of_process("skipped.jsonl"), config.data.max_unreadable_fraction)
    )
    files.enter_context(contextlib.closing(skipped))
    reporter = run_on_first(lambda: Reporter(config, store, own, loaded, int(state.step), flops))
    if reporter is not None:
        files.enter_context(contextlib.closing(reporter))
    run = Run(
        config=config,
        mesh=mesh,
        samples=samples,
        loaded=loaded,
        step=step,
        identity=own,
        checkpoints=checkpoints,
        validation=validation,
        skipped=skipped,
        reporter=reporter,
        first_call=first_call,
    )
    return Started(run, state)


def _check_data(samples: Samples, loaded: LoadedNetworks, config: Train) -> None:
    check_precomputed(samples, loaded, config.data.resolution, config.model.image_encoder)


def _restored_or_initial(
    config: Train, mesh: Mesh, loaded: LoadedNetworks, checkpoints: Checkpoints, own: RunIdentity, store: Store
) -> TrainState:
    """The state of the newest good checkpoint, or the initial one, sharded over the mesh.

    Raises InputError when the checkpoint was made with other settings, data or weights.
    """
    optimizer, mask = _optimizer(config), trainable_mask(config.model)
    trainable = partition(loaded.frozen.params | loaded.params, mask)

    def initial(params: Partitioned) -> TrainState:
        return init_train_state(params, optimizer, dtype=config.model.dtype, ema=config.optim.ema is not None)

    template = jax.eval_shape(initial, trainable)
    shardings = state_shardings(mesh, template)
    before = checkpoints.about()
    if before is not None:
        if changed := own.changes_since(before):
            raise InputError(
                f"{store} holds a run that started differently: {'; '.join(changed[:8])}; resume with the settings "
                "and data that it started with, or choose another --out"
            )
        found = checkpoints.restore(
            jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), template, shardings)
        )
        if found is not None:
            log.info("resuming from step %d", found.step)
            return found.state
    return jax.jit(initial, out_shardings=shardings)(trainable)


def _optimizer(config: Train) -> optax.GradientTransformation:
    return make_optimizer(config.optim, trainable_mask(config.model))


def _traced_step(
    config: Train, mesh: Mesh, loaded: LoadedNetworks, samples: Samples, state: TrainState
) -> "_TracedStep":
    """The jitted step and its FLOP over all devices, with rematerialized UNet blocks where a device's memory would not
    hold the activations otherwise. Raises InputError, before anything is compiled, when a step cannot fit."""
    size, sharding = config.data.batch_size, batch_sharding(mesh)
    sample = first_readable_sample(samples, 0)
    batch = batch_of(
        {
            name: jax.ShapeDtypeStruct((size, *array.shape), array.dtype, sharding=sharding)
            for name, array in sample.items()
        }
    )
    limit = device_memory_limit()
    if limit is not None:
        loaded = _fitted(config, mesh, loaded, state, batch, limit)
    step = jax.jit(
        _step_of(config, loaded.networks)(mesh),
        donate_argnums=0,
        out_shardings=StepResult._make([state_shardings(mesh, state), replicated(mesh)]),
    )
    return _TracedStep(loaded, step, count_flops(step.trace(state, loaded.frozen, batch).jaxpr).total())


class _TracedStep(NamedTuple):
    loaded: LoadedNetworks
    step: Step
    flops: int


def _step_of(config: Train, networks: Networks) -> Callable[[Mesh], Step]:
    return lambda mesh: make_step(networks, _optimizer(config), config, mesh)


def _fitted(
    config: Train, mesh: Mesh, loaded: LoadedNetworks, state: TrainState, batch: TrainBatch, limit: int
) -> LoadedNetworks:
    """The networks, with rematerialized UNet blocks where a step would not fit into `limit` bytes otherwise."""
    needed = plan_memory(_step_of(config, loaded.networks), mesh, state, loaded.frozen, batch)
    if _MEMORY_MARGIN * needed.total > limit and config.model.remat == "auto":
        unet = loaded.networks.unet.clone(remat=True)
        loaded = dataclasses.replace(loaded, networks=dataclasses.replace(loaded.networks, unet=unet))
        log.info("the UNet's blocks are rematerialized in the backward pass: they would not fit otherwise")
        needed = plan_memory(_step_of(config, loaded.networks), mesh, state, loaded.frozen, batch)
    log.info("memory:\n%s", needed.table())
    if needed.total > limit:
        ways = memory_remedies(
            mesh,
            batch_size=config.data.batch_size,
            accumulate=config.optim.accumulate,
            remat=config.model.remat,
            live=not isinstance(batch, EncodedBatch),
        )
        numbers = f"about {needed.total / 2**30:.1f} GiB on each device, which has {limit / 2**30:.1f}"
        if needed.total > _MEMORY_MARGIN * limit:
            raise InputError(f"a step needs {numbers}; use {ways}")
        log.warning("a step may need %s; if it fails, use %s", numbers, ways)
    return loaded


def _validation(
    config: Train, mesh: Mesh, loaded: LoadedNetworks, samples: Samples, first_call: AnnounceFirstCall
) -> Validation | None:
    if not config.log.validate_every:
        return None
    path = config.log.validation_path
    if path is not None:
        samples = open_samples(path, config.data, config.model)
        log_record_count(path, samples)
        _check_data(samples, loaded, config)
    with first_call("compiling the encoders and encoding the validation batch"):
        return Validation(config.log, mesh, loaded, samples)


def _name_of_process(name: str) -> str:
    """Process 0 writes to "stem.suffix", process N to "stem-N.suffix"."""
    number = jax.process_index()
    path = Path(name)
    return f"{path.stem}-{number}{path.suffix}" if number else name
