"""What process 0 writes of a run: metrics, curves, images, and the adapter file."""

from contextlib import AbstractContextManager

import jax
from PIL import Image

from ipadapter_jax.storage.store import Store
from ipadapter_jax.train.config import Train
from ipadapter_jax.train.export import export_run
from ipadapter_jax.train.metrics_log import RunLog
from ipadapter_jax.train.networks import LoadedNetworks
from ipadapter_jax.train.optim import Partitioned
from ipadapter_jax.train.run_identity import RunIdentity
from ipadapter_jax.train.step import StepMetrics
from ipadapter_jax.train.throughput import ProgressLine, Throughput, peak_flops


class Reporter:
    """Writes into the store of a run. `flops` is what a step costs, over all devices."""

    def __init__(
        self,
        config: Train,
        store: Store,
        identity: RunIdentity,
        loaded: LoadedNetworks,
        first: int,
        flops: float | None,
    ):
        self._config, self._loaded, self._identity = config, loaded, identity
        self._store = store
        sources = {part: str(path) for part, path in loaded.sources.items()}  # of the Hub, with the commit
        written = {**identity.to_json(), "sources": sources}
        self._log = RunLog(
            store, tensorboard=config.log.tensorboard, wandb=config.log.wandb, config=written, first_step=first
        )
        peak = peak_flops(jax.devices()[0].device_kind, config.model.dtype)
        self._throughput = Throughput(
            first_step=first,
            total_steps=config.steps,
            batch_size=config.data.batch_size,
            flops_per_step=flops,
            peak=None if peak is None else peak * jax.device_count(),
        )
        self._progress = ProgressLine(first, config.steps)

    def step(self, number: int, metrics: StepMetrics, **counts: int) -> None:
        """Logs a finished step when it is its turn."""
        if number % self._config.log.every and number != self._config.steps:
            return
        found = {name: value.item() for name, value in metrics._asdict().items() if value is not None}
        numbers = found | self._throughput.report(number)
        self._log.write(number, numbers | counts)
        self._progress.show(number, numbers, self._throughput.eta())

    def paused(self) -> AbstractContextManager[None]:
        """What happens inside does not count as training time."""
        return self._throughput.paused()

    def validated(self, number: int, losses: dict[str, float], grid: Image.Image | None) -> None:
        self._log.write(number, losses)
        if grid is not None:
            self._log.image(number, "samples", grid)

    def export(self, number: int, trainable: Partitioned) -> None:
        """Exports the trainable parameters, given as arrays of this process."""
        export_run(
            self._store,
            trainable,
            self._loaded,
            model=self._config.model,
            dtype=self._config.checkpoint.export_dtype,
            identity=self._identity,
            step=number,
        )

    def close(self) -> None:
        self._progress.close()
        self._log.close()
