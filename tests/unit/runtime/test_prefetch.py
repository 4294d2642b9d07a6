"""Functions of many items in threads: results in order, and the caller's context in every thread."""

import contextlib
import threading
import time

import pytest

from ipadapter_jax.errors import argument, errors_name_options
from ipadapter_jax.runtime.prefetch import ordered_map


def test_results_are_in_order_and_few_are_ahead() -> None:
    started: list[int] = []
    threads_before = threading.active_count()

    def slow(item: int) -> int:
        started.append(item)
        time.sleep(0.01 * (item % 3))
        return item * item

    with contextlib.closing(ordered_map(slow, range(40), threads=4, ahead=6)) as results:
        assert [next(results) for _ in range(10)] == [item * item for item in range(10)]
        assert len(started) <= 17
    assert threading.active_count() < threads_before + 9 and len(started) < 40


def test_errors_in_threads_name_options_as_their_caller_does() -> None:
    def said(item: int) -> str:
        return argument("fit", item)

    assert [*ordered_map(said, range(2), threads=2, ahead=2)] == ["fit=0", "fit=1"]
    with errors_name_options({"fit": "--reference-resize"}):
        assert [*ordered_map(said, range(5), threads=2, ahead=2)] == [f"--reference-resize {item}" for item in range(5)]


def test_an_error_is_raised_in_place_of_its_result() -> None:
    results = ordered_map(lambda item: 1 // item, [1, 0, 1], threads=2, ahead=3)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
