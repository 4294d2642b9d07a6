"""Times several functions in turns, so that a machine that is slow for a while slows all of them equally."""

import gc
import time
from collections.abc import Callable
from typing import Any


def seconds_in_turns(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every job; each must end with its work done, and has been run once before."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            gc.collect()
            started = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - started)
    return times
