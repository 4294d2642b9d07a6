"""Damaged files of weights, by default a tenth of each kind, 200 at least. fuzz_weights.py runs more."""

import os
import time

import numpy as np
import pytest
from helpers import slow

from ipadapter_jax.errors import WeightFileError
from tests.fault_injection import fuzz_weights
from tests.fault_injection.fuzz_weights import Fuzzer

COUNTS = {"safetensors": 20_000, "bin": 10_000, "openclip": 2_000, "msgpack": 2_000, "index": 2_000, "single file": 300}


@pytest.mark.parametrize("share", [0.1, *slow(1)])
@pytest.mark.parametrize("kind", COUNTS)
def test_only_whole_tensors_under_their_own_names_come_through(tmp_path, kind, share):
    count = max(200, int(share * COUNTS[kind]))
    fuzzer = Fuzzer(tmp_path, kind, seed=20)
    fuzzer.run(count)
    assert fuzzer.faults == []
    assert fuzzer.seen["refused"] > count / 2 and fuzzer.seen["unharmed"] > count / 50  # neither too gentle nor rough
    assert fuzzer.seen.keys() <= {"refused", "unharmed", "other bits, no digest"}


def turned(path):
    content = fuzz_weights.Content({"x": np.zeros((2, 3), np.float32)}, False)
    return content if path.name != "damaged" else content._replace(arrays={"x": np.zeros((3, 2), np.float32)})


def not_finite(path):
    return fuzz_weights.Content({"x": np.full(3, np.inf if path.name == "damaged" else 0, np.float32)}, False)


def changed(path):
    return fuzz_weights.Content({"x": np.full(3, path.name == "damaged", np.float32)}, True)


def runs_code(path):
    os.system("true")
    raise WeightFileError(f"{path}: no")


def slow_reader(path):
    end = time.process_time() + 0.02
    while time.process_time() < end:
        pass
    raise WeightFileError(f"{path}: no")


def greedy(path):
    np.zeros(1 << 20).sum()
    raise WeightFileError(f"{path}: no")


def crashes(path):
    raise KeyError(path)


def silent(path):
    raise WeightFileError("no")


@pytest.mark.parametrize(
    ("reader", "word"),
    [
        (turned, "other names, shapes or dtypes"),
        (not_finite, "not finite"),
        (changed, "other bits under a digest"),
        (runs_code, "executed os.system"),
        (slow_reader, "took 0."),
        (greedy, "bytes for"),
        (crashes, "KeyError"),
        (silent, "message 'no'"),
    ],
)
def test_the_fuzzer_sees_what_must_not_happen(tmp_path, monkeypatch, reader, word):
    fuzzer = Fuzzer(tmp_path, "bin", seed=1)
    monkeypatch.setattr(fuzz_weights, "SECONDS", 0.01)
    good = [reader(tmp_path / "good")] if reader in (turned, not_finite, changed) else []
    fuzzer._read, fuzzer._good = reader, good * 6 or fuzzer._good
    fuzzer.run(1)
    assert any(word in fault for fault in fuzzer.faults), fuzzer.faults
