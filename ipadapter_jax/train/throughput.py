"""How fast a run is, how long it will take, and the line that says so."""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import tqdm

# Peak of dense 16-bit products in FLOP/s of one jax device by its device_kind, from the makers' data sheets; the first
# match counts. A device of a TPU v3 is one of the chip's two cores.
_PEAKS = [
    ("V100", {"float16": 125e12}),  # no bfloat16
    ("A100", {"float16": 312e12, "bfloat16": 312e12}),
    ("H100 PCIe", {"float16": 756e12, "bfloat16": 756e12}),
    ("H100 NVL", {"float16": 835e12, "bfloat16": 835e12}),
    ("H100", {"float16": 989e12, "bfloat16": 989e12}),
    ("H200 NVL", {"float16": 835e12, "bfloat16": 835e12}),
    ("H200", {"float16": 989e12, "bfloat16": 989e12}),
    ("TPU v3", {"bfloat16": 61.5e12}),
    ("TPU v4 lite", {}),
    ("TPU v4", {"bfloat16": 275e12}),
    ("TPU v5 lite", {"bfloat16": 197e12}),  # v5e, under its other name
    ("TPU v5e", {"bfloat16": 197e12}),
    ("TPU v5", {"bfloat16": 459e12}),  # v5p
    ("TPU v6", {"bfloat16": 918e12}),  # "TPU v6 lite", v6e
]


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one jax device for matrix products in `dtype`, or None where it is not known."""
    return next((peaks.get(dtype) for name, peaks in _PEAKS if name in device_kind), None)


class Throughput:
    """Speed of a run, from the steps it has done and the time they took.

    batch_size: images per step, over all devices; flops_per_step and peak (FLOP/s) likewise, None where unknown.
    """

    def __init__(
        self,
        *,
        first_step: int,
        total_steps: int,
        batch_size: int,
        flops_per_step: float | None = None,
        peak: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._batch_size, self._clock = total_steps, batch_size, clock
        self._flops_per_image = flops_per_step / batch_size if flops_per_step else None
        self._peak = peak
        self._step, self._since = first_step, clock()
        self._rates: list[float] = []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (validation, sampling, compiling) is not training time."""
        start = self._clock()
        try:
            yield
        finally:
            self._since += self._clock() - start

    def report(self, step: int) -> dict[str, float]:
        """Speed since the last report: {"images_per_second", and "mfu" in [0, 1] where it can be known}."""
        now = self._clock()
        rate = (step - self._step) * self._batch_size / max(now - self._since, 1e-9)
        self._step, self._since = step, now
        self._rates.append(rate)
        return {"images_per_second": rate, **self._mfu(rate)}

    def summary(self) -> dict[str, float]:
        """The median over all reports but the first, which has the compilation in it."""
        rate = statistics.median(self._rates[1:] or self._rates or [0.0])
        return {"images_per_second": rate, **self._mfu(rate)}

    def eta(self) -> str:
        """The time that the rest of the run takes at the median speed, as text."""
        if len(self._rates) < 2:
            return "unknown yet"
        return duration_text((self._total - self._step) * self._batch_size / self.summary()["images_per_second"])

    def _mfu(self, images_per_second: float) -> dict[str, float]:
        if self._flops_per_image is None or self._peak is None:
            return {}
        return {"mfu": images_per_second * self._flops_per_image / self._peak}


def duration_text(seconds: float) -> str:
    """Two units are enough: "3 d 4 h", "2 h 5 min", "4 min 10 s", "7 s"."""
    left = round(seconds)
    counts = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        counts.append((left // size, unit))
        left %= size
    first = next((i for i, (count, _) in enumerate(counts) if count), len(counts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in counts[first : first + 2])


class ProgressLine:
    """One line that renews itself on a terminal, else a line per report, both on standard error."""

    def __init__(self, first_step: int, total_steps: int):
        self._first, self._total = first_step, total_steps
        self._bar: tqdm.tqdm | None = None  # from the first report on: compiling comes before

    def show(self, step: int, metrics: Mapping[str, float], eta: str) -> None:
        """Shows "loss", "images_per_second" and "mfu" of `metrics`, those that are there."""
        parts = {"loss": "loss {:.4f}", "images_per_second": "{:.1f} images/s", "mfu": "MFU {:.1%}"}
        shown = [text.format(metrics[name]) for name, text in parts.items() if name in metrics]
        line = ", ".join([f"step {step}/{self._total}", *shown, f"ETA {eta}"])
        if self._bar is None:
            self._bar = tqdm.tqdm(
                total=self._total,
                initial=self._first,
                disable=None,
                bar_format="{percentage:3.0f}% |{bar:20}| {desc}",
            )
        if self._bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.set_description_str(line, refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
