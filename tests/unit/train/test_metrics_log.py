"""Metrics, images and skipped records of a run on disk, and what a resumed run does with them."""

import contextlib
import json
import math
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from ipadapter_jax.errors import InputError
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.train.metrics_log import RunLog, SkippedRecordLog

CONFIG = {"optim": {"learning_rate": 1e-4}}


class SkippedRecord(NamedTuple):
    index: int
    key: str
    reason: str


@contextlib.contextmanager
def run_log(folder: Path, first_step: int = 0, *, tensorboard: bool = False, wandb: str | None = None):
    log = RunLog(LocalStore(folder), tensorboard=tensorboard, wandb=wandb, config=CONFIG, first_step=first_step)
    yield log
    log.close()


def lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def events(folder: Path) -> Iterator:
    """All events of all files, in the order of the files' names."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


# --- metrics.jsonl


def test_metrics_read_back_exactly(tmp_path):
    third = np.float32(1) / 3
    with run_log(tmp_path) as log:
        log.write(50, {"loss": third, "bad_rows": 2, "ratio": 0.1 + 0.2})
        (line,) = lines(tmp_path / "metrics.jsonl")  # on disk before the log is closed
    assert list(line) == ["step", "loss", "bad_rows", "ratio"]
    assert line == {"step": 50, "loss": float(third), "bad_rows": 2, "ratio": 0.1 + 0.2}


def test_non_finite_numbers_are_valid_json(tmp_path):
    with run_log(tmp_path) as log:
        log.write(1, {"loss": math.nan, "norm": np.float32(-np.inf)})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert math.isnan(float(line["loss"])) and float(line["norm"]) == -math.inf


@pytest.mark.parametrize("tail", [b"", b'{"step": 25, "lo', b'{"step": 25, "loss": 0.5}\n{"step"', b"\0" * 40])
def test_resuming_cuts_what_was_written_after_the_checkpoint(tmp_path, tail):
    with run_log(tmp_path) as log:
        for step in (10, 20, 24, 30):
            log.write(step, {"loss": 1 / step})
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before) + tail)
    with run_log(tmp_path, first_step=24) as log:
        assert path.read_bytes() == b"".join(before[:3])
        log.write(30, {"loss": 1 / 30})
    assert path.read_bytes() == b"".join(before)


def test_restarting_from_step_0_removes_old_metrics(tmp_path):
    with run_log(tmp_path) as log:
        log.write(1, {"loss": 1.0})
    with run_log(tmp_path):
        assert not lines(tmp_path / "metrics.jsonl")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").write_text("a file")
    with (
        pytest.raises(InputError, match=r"run/metrics.jsonl: not written .*choose another folder"),
        run_log(tmp_path / "run"),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full, on Linux")
def test_a_full_disk_is_reported(tmp_path):
    log = RunLog(LocalStore(tmp_path), tensorboard=False, wandb=None, config=CONFIG, first_step=0)
    log._metrics._file = open("/dev/full", "w")  # noqa: SIM115 closing it would fail, too
    with pytest.raises(InputError, match=r"metrics.jsonl: not written \(No space left on device\); make room"):
        log.write(1, {"loss": 1.0})


# --- TensorBoard


def test_tensorboard_has_numbers_image_and_config(tmp_path):
    with run_log(tmp_path, tensorboard=True) as log:
        log.write(50, {"loss": 0.25})
        log.image(50, "grid", Image.new("RGB", (4, 2), "red"))
    found = list(events(tmp_path))
    values = {value.tag: (event.step, value) for event in found for value in event.summary.value}
    assert (values["loss"][0], values["loss"][1].simple_value) == (50, 0.25)
    assert values["grid"][0] == 50 and (values["grid"][1].image.height, values["grid"][1].image.width) == (2, 4)
    assert any("config" in tag for tag in values)
    with Image.open(tmp_path / "samples" / "grid-0000050.png") as saved:
        assert saved.size == (4, 2) and saved.getpixel((0, 0)) == (255, 0, 0)


def test_resuming_purges_later_steps_from_tensorboard(tmp_path):
    for first_step in (0, 24):
        with run_log(tmp_path, first_step, tensorboard=True):
            pass
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts[-1] == 25


def test_without_tensorboard_there_are_no_events(tmp_path):
    with run_log(tmp_path) as log:
        log.write(1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# --- wandb, of which a stand-in records the calls


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.logged, self.finished = settings, [], False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb_runs(monkeypatch) -> list[FakeRun]:
    runs: list[FakeRun] = []

    def init(**settings):
        runs.append(FakeRun(**settings))
        return runs[-1]

    module = types.SimpleNamespace(init=init, Image=lambda image: ("image", image.size), Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_wandb_gets_everything_and_a_resumed_run_continues_it(tmp_path, wandb_runs):
    for first_step in (0, 50):
        with run_log(tmp_path, first_step, wandb="adapters") as log:
            log.write(50, {"loss": 0.5})
            log.image(50, "grid", Image.new("RGB", (4, 2)))
    first, second = wandb_runs
    assert first.logged == [{"step": 50, "loss": 0.5}, {"step": 50, "grid": ("image", (4, 2))}] and first.finished
    assert first.settings["project"] == "adapters" and first.settings["config"] == CONFIG
    assert first.settings["id"] == second.settings["id"] and second.settings["resume"] == "allow"


def test_wandb_refusing_to_start_is_one_line(tmp_path, wandb_runs, monkeypatch):
    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(InputError, match="api_key not configured.*WANDB_MODE=offline"), run_log(tmp_path, wandb="p"):
        pass


def test_missing_wandb_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"), run_log(tmp_path, wandb="project"):
        pass


# --- skipped.jsonl


def test_a_record_is_listed_once_over_epochs_and_resumes(tmp_path):
    path = tmp_path / "skipped.jsonl"
    skips = SkippedRecordLog(LocalStore(path.parent), path.name, max_fraction=0.5)
    skips.add(8, [SkippedRecord(3, "a/3.png", "truncated")])
    skips.add(8, [SkippedRecord(3, "a/3.png", "truncated"), SkippedRecord(5, "ü.png", "no image")])
    skips.close()
    assert (skips.seen, skips.bad) == (16, 3)
    with open(path, "a") as file:
        file.write('{"index": 9, "ke')  # a kill while writing

    resumed = SkippedRecordLog(LocalStore(path.parent), path.name, max_fraction=0.5)
    resumed.add(8, [SkippedRecord(5, "ü.png", "no image"), SkippedRecord(7, "b.png", "too large")])
    resumed.close()
    assert lines(path) == [
        {"index": 3, "key": "a/3.png", "reason": "truncated"},
        {"index": 5, "key": "ü.png", "reason": "no image"},
        {"index": 7, "key": "b.png", "reason": "too large"},
    ]
    assert (resumed.seen, resumed.bad) == (8, 2)


def test_too_large_a_fraction_stops_the_run_after_enough_samples(tmp_path):
    skips = SkippedRecordLog(LocalStore(tmp_path), "skipped.jsonl", max_fraction=0.1)
    bad = [SkippedRecord(i, f"{i}.png", "no image") for i in range(21)]
    skips.add(100, bad[:10])
    skips.add(99, bad[10:20])  # 20 of 199: more than allowed, too few rows to tell
    skips.add(1, [])  # 20 of 200: as much as is allowed
    with pytest.raises(InputError, match=r"21 of 201 .* 10.4% where 10.0% .*skipped.jsonl.*repair or remove"):
        skips.add(1, bad[20:])
    assert len(lines(tmp_path / "skipped.jsonl")) == 21
