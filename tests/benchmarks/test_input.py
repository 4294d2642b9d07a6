"""The benchmark of the input pipeline runs; what it measures is nothing to test."""

import re

from benchmarks import input


def test_the_benchmark_prints_its_rates(capsys):
    input.main(input.Settings(batch=2, records=8, runs=1))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ processors, load .* before; workers 0, threads 8, batches of 2", lines[0])
    rates = [re.search(r": ([\d,]+) samples/s, the median of", line) for line in lines[1:]]
    assert len(rates) == 2 and all(rate and int(rate[1].replace(",", "")) > 0 for rate in rates)
