"""The benchmark of the training step: it runs, both sides compute the same, and its numbers are what they say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.train import Result, Results, Settings, compare, disagreement, report

ROOT = Path(__file__).resolve().parents[2]


def answer(seed: int = 0, **changes: float) -> dict[str, np.ndarray]:
    found = {"loss": np.float32(1.5), "norm": np.float32(0.25)}
    return found | {"gradient": np.random.default_rng(seed).standard_normal(100, np.float32)} | changes


@pytest.mark.parametrize(
    ("theirs", "good"),
    [
        (answer(), True),
        (answer(loss=1.5 * 1.00005), True),
        (answer(loss=1.5 * 1.0002), False),
        (answer(norm=0.25 * 1.002), False),
        (answer(seed=1), False),
        (answer(loss=float("nan")), False),
        (answer() | {"gradient": np.zeros(100, np.float32)}, False),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")  # zero / zero is part of the question
def test_sides_must_agree(theirs, good):
    found = compare(answer(), theirs)
    assert (disagreement("authors", "float32", found) is None) == good


def test_the_table_derives_from_the_turns():
    settings = Settings(weights=Path("w"), batch_size=4, steps=5, peak_tflops=2.0)
    agreement = {"loss": 1e-7, "norm": 1e-7, "gradient": 1e-12}

    def side(*seconds: float) -> Result:
        return Result("CPU", 1.0, 2.0, list(seconds), list(seconds), 2**30, agreement)

    live = Results({"ours": side(2.0, 1.0, 4.0), "authors": side(4.0, 4.0, 5.0)}, flops=4 * 10**11, product=1e13)
    cached = Results({"ours": side(1.0), "authors": side(3.0), "tuned": side(2.0)}, flops=2 * 10**11, product=1e13)
    text, numbers = report(settings, {"precomputed": cached, "live": live}, load=0.0)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert table[0] == ["", "ours", "authors", "tuned"]
    assert ["samples/s, median", "20", "6.667", "10"] in table  # 4 x 5 samples in 1, 3 and 2 seconds
    assert ["samples/s, median", "10", "5", ""] in table
    assert ["samples/s, slowest turn", "5", "4", ""] in table
    assert ["ours is faster by", "1.00", "2.00", ""] in table
    assert ["MFU, 100 GFLOP a sample", "50.0%", "25.0%", ""] in table  # 10 x 1e11 of 2e12
    assert ["days for 64M samples", "74.1", "148", ""] in table
    assert "ours precomputed / authors live: 4.00" in text
    assert numbers["results"]["live"]["sides"]["authors"]["wall"] == [4.0, 4.0, 5.0]


@pytest.mark.slow
@pytest.mark.torch
def test_both_sides_run_and_agree(tmp_path):
    weights, out = tmp_path / "weights", tmp_path / "numbers.json"
    subprocess.run([sys.executable, "-m", "ipadapter_jax.testing.random_weights", "--out", weights], check=True)
    options = ["--weights", weights, "--size", "64", "--batch-size", "4", "--steps", "1", "--rounds", "1", "--cpu"]
    subprocess.run([sys.executable, "-m", "benchmarks.train", *options, "--out", out], check=True)
    numbers = json.loads(out.read_text(encoding="utf-8"))
    assert numbers["device"] == "CPU" and set(numbers["results"]) == {"precomputed", "live"}
    for result in numbers["results"].values():
        assert result["flops"] > 0 and set(result["sides"]) == {"ours", "authors"}
        agreement = result["sides"]["authors"]["agreement"]  # the limits of the script are wider
        assert agreement["loss"] < 1e-5 and agreement["norm"] < 1e-5 and agreement["gradient"] < 1e-9
