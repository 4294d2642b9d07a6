"""A function of many items, computed ahead by threads, one result after the other."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Generator[Result, None, None]:
    """`function(item)` of every item in their order; at most `ahead` results are in memory. What it raises is raised
    when its turn has come. Closing the generator drops what was computed ahead."""

    pool, computing = ThreadPoolExecutor(threads), deque[Future[Result]]()
    try:
        for item in items:
            if len(computing) >= ahead:
                yield computing.popleft().result()
            computing.append(pool.submit(function, item))
        while computing:
            yield computing.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
