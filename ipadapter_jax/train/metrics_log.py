"""What a run leaves to read: metrics on disk, in TensorBoard and wandb, and the list of skipped records."""

import importlib
import io
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jax.typing import ArrayLike
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.jsonl import errors_naming
from ipadapter_jax.storage.store import Store
from ipadapter_jax.storage.text_files import decode_text, encode_utf8

_WANDB_ID = "wandb-id.txt"  # the id of a run on Weights & Biases


class RunLog:
    """Metrics of one run in its store: always metrics.jsonl, on wish TensorBoard events and wandb.

    A resumed run gives the step that it continues from as `first_step` (0: from the start): what a killed run wrote
    after it is cut off, so that the log reads as if nothing had happened. `config`, JSON-able, is shown next to the
    curves. Only one process of a run may have one. Raises InputError when a file cannot be written or wandb not used.
    """

    def __init__(
        self, store: Store, *, tensorboard: bool, wandb: str | None, config: Mapping[str, object], first_step: int
    ):
        self._store = store
        self._metrics = store.append_jsonl("metrics.jsonl", lambda line: _is_step(line.get("step"), first_step))
        self._tensorboard = _TensorBoard(store.path("tensorboard"), config, first_step) if tensorboard else None
        self._wandb = _WandB(store, wandb, config) if wandb is not None else None

    def write(self, step: int, metrics: Mapping[str, ArrayLike]) -> None:
        """One line of numbers (Python's, numpy's or jax's scalars). Floats read back bit for bit; as JSON has no NaN
        and no infinities, they become strings that float() reads."""
        numbers = {name: np.asarray(value).item() for name, value in metrics.items()}
        shown = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        self._metrics.add({"step": step, **shown})
        if self._tensorboard is not None:
            self._tensorboard.write(step, numbers)
        if self._wandb is not None:
            self._wandb.write(step, numbers)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """An image, such as a grid of samples: also samples/NAME-STEP.png."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        samples = self._store.inside("samples")
        samples.remove_partial_files()
        samples.write(f"{name}-{step:07d}.png", buffer.getvalue())
        if self._tensorboard is not None:
            self._tensorboard.image(step, name, image)
        if self._wandb is not None:
            self._wandb.image(step, name, image)

    def close(self) -> None:
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()


class SkippedRecord(Protocol):
    """A record that could not be used, as the data side reports it."""

    @property
    def index(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def reason(self) -> str: ...


class SkippedRecordLog:
    """The list skipped.jsonl: every record that could not be used, once, over all resumes and epochs.

    `seen` and `bad` count the samples of this run (since its last start).
    """

    ENOUGH = 200  # samples before a fraction is meaningful

    def __init__(self, store: Store, name: str, max_fraction: float):
        self.seen = self.bad = 0
        self._path, self._max_fraction = store.path(name), max_fraction
        self._lines = store.append_jsonl(name, lambda line: isinstance(line.get("index"), int))
        self._listed = {line["index"] for line in self._lines.found}

    def add(self, samples: int, skipped: Iterable[SkippedRecord]) -> None:
        """Counts a batch of `samples` samples, some of which replace the records in `skipped`.

        Raises InputError when more than `max_fraction` of at least 200 samples had to be replaced.
        """
        self.seen += samples
        for record in skipped:
            self.bad += 1
            if record.index not in self._listed:
                self._listed.add(record.index)
                self._lines.add({"index": record.index, "key": record.key, "reason": record.reason})
        if self.seen >= self.ENOUGH and self.bad > self._max_fraction * self.seen:
            raise InputError(
                f"{self.bad} of {self.seen} records cannot be used, {self.bad / self.seen:.1%} where "
                f"{self._max_fraction:.1%} is allowed: {self._path} lists the reasons; repair or remove them, "
                "or raise data.max_unreadable_fraction"
            )

    def close(self) -> None:
        self._lines.close()


class _TensorBoard:
    """Events for TensorBoard, written immediately and from this thread.

    tensorboardX' own SummaryWriter hands them to a thread that dies when the disk is full; then the run would hang.
    """

    def __init__(self, folder: Path, config: Mapping[str, object], first_step: int):
        # Here and not above, because it imports torch where that is installed.
        import tensorboardX.summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._folder, self._summary = folder, tensorboardX.summary
        self._proto: Any = event_pb2  # its classes are made at run time, unknown to type checkers
        with errors_naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # File names carry the second only: the process tells a quick restart from the run before it.
            self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        # The session tells TensorBoard to forget what an earlier file says of this step and later ones.
        self._add(first_step + 1, session_log=self._proto.SessionLog(status=self._proto.SessionLog.START))
        written = encode_utf8(json.dumps(config, indent=2, ensure_ascii=False)).decode()
        indented = written.replace("\n", "\n    ")  # 4 blanks: code in markdown
        self._add(first_step, summary=self._summary.text("config", f"    {indented}"))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._add(step, summary=self._summary.scalar(name, value))

    def image(self, step: int, name: str, image: Image.Image) -> None:
        pixels = np.asarray(image.convert("RGB"))
        self._add(step, summary=self._summary.image(name, pixels, dataformats="HWC"))

    def close(self) -> None:
        with errors_naming(self._folder):
            self._writer.close()

    def _add(self, step: int, **content: object) -> None:
        with errors_naming(self._folder):
            self._writer.write_event(self._proto.Event(step=step, wall_time=time.time(), **content))
            self._writer.flush()


class _WandB:
    """Metrics for Weights & Biases. The id of the run is stored in its store, so that a resumed run continues it."""

    def __init__(self, store: Store, project: str, config: Mapping[str, object]):
        try:
            self._module = importlib.import_module("wandb")
        except ImportError as error:
            raise InputError(f"wandb cannot be imported ({error}): pip install wandb, or do without it") from None
        if store.size(_WANDB_ID) is None:
            store.write(_WANDB_ID, os.urandom(8).hex().encode())
        content = store.read(_WANDB_ID, remedy="remove it to start another run there")
        name = decode_text(content, store.path(_WANDB_ID))
        try:
            self._run = self._module.init(project=project, id=name, resume="allow", dir=str(store), config=dict(config))
        except self._module.Error as error:
            raise InputError(f"wandb: {error}; `wandb login`, set WANDB_MODE=offline, or do without it") from None
        # wandb's own step counter never goes back, as a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({"step": step, name: self._module.Image(image)})

    def close(self) -> None:
        self._run.finish()


def _is_step(value: object, last: int) -> bool:
    return isinstance(value, int) and value <= last and last > 0  # a run that starts anew validates step 0 again
