"""A function of many items, computed ahead by threads, one result after the other."""

import contextvars
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def submit(pool: ThreadPoolExecutor, function: Callable[..., Result], *args: object) -> Future[Result]:
    """`function(*args)` in a thread of the pool, with the caller's context variables: an error names options or
    arguments by one of them, and threads begin with none."""
    return pool.submit(contextvars.copy_context().run, function, *args)


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Generator[Result, None, None]:
    """`function(item)` of every item in their order; at most `ahead` results are in memory. What it raises is raised
    when its turn has come. It sees the context variables of the caller. Closing the generator drops what was computed
    ahead."""

    pool, computing = ThreadPoolExecutor(threads), deque[Future[Result]]()
    try:
        for item in items:
            if len(computing) >= ahead:
                yield computing.popleft().result()
            computing.append(submit(pool, function, item))
        while computing:
            yield computing.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
