"""Speed, what is left of a run, and the line that is shown."""

import sys

import pytest

from ipadapter_jax.train.throughput import ProgressLine, Throughput, duration_text, peak_flops


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, **settings) -> Throughput:
    return Throughput(first_step=1000, total_steps=2000, batch_size=8, clock=clock, **settings)


def test_speed_is_that_since_the_last_report():
    clock = Clock()
    meter = make(clock, flops_per_step=4e12, peak=2e13)
    clock.now += 10
    assert meter.report(1005) == {"images_per_second": 4.0, "mfu": 4 / 8 * 4e12 / 2e13}
    clock.now += 5
    assert meter.report(1015)["images_per_second"] == 16.0


def test_the_median_leaves_the_compilation_out_and_gives_the_rest():
    clock = Clock()
    meter = make(clock, flops_per_step=8e12, peak=1e14)
    assert meter.eta() == "unknown yet"
    clock.now += 100
    meter.report(1010)
    assert meter.eta() == "unknown yet" and meter.summary()["images_per_second"] == 0.8
    for step, seconds in ((1020, 5), (1030, 4), (1040, 10)):
        clock.now += seconds
        meter.report(step)
    assert meter.summary() == {"images_per_second": 16.0, "mfu": 0.16}
    assert meter.eta() == "8 min 0 s"  # 960 steps of 8 images


def test_pauses_are_not_training_time():
    clock = Clock()
    meter = make(clock)
    clock.now += 4
    with meter.paused():
        clock.now += 1000
    assert meter.report(1010)["images_per_second"] == 20.0


@pytest.mark.parametrize("known", [{"flops_per_step": 1e12}, {"peak": 1e12}, {}])
def test_no_mfu_where_it_cannot_be_known(known):
    clock = Clock()
    meter = make(clock, **known)
    clock.now += 1
    assert list(meter.report(1001)) == ["images_per_second"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min 0 s"), (250, "4 min 10 s"), (7500, "2 h 5 min"), (3 * 86400 + 4 * 3600, "3 d 4 h")],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("kind", "dtype", "tera"),
    [
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H200", "float16", 989),
        ("TPU v3", "bfloat16", 61.5),
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("TPU v6 lite", "float16", None),
        ("NVIDIA H200", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peaks(kind, dtype, tera):
    assert peak_flops(kind, dtype) == (None if tera is None else tera * 1e12)


def test_without_a_terminal_every_report_is_a_line(capsys):
    progress = ProgressLine(100, 1000)
    progress.show(150, {"loss": 0.12345, "images_per_second": 53.21, "mfu": 0.412, "norm": 3.0}, "4 min 10 s")
    progress.show(200, {"loss": 0.1, "images_per_second": 50.0}, "4 min 0 s")
    progress.close()
    assert capsys.readouterr().err == (
        "step 150/1000, loss 0.1235, 53.2 images/s, MFU 41.2%, ETA 4 min 10 s\n"
        "step 200/1000, loss 0.1000, 50.0 images/s, ETA 4 min 0 s\n"
    )


def test_on_a_terminal_one_line_renews_itself(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = ProgressLine(100, 1000)
    progress.show(550, {"loss": 0.1}, "7 s")
    progress.close()
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "\r" in shown
    assert " 55% |" in shown and "step 550/1000, loss 0.1000, ETA 7 s" in shown
