"""Applies a function to many items in threads, some items ahead, with the results in order."""

import contextvars
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def submit(pool: ThreadPoolExecutor, function: Callable[..., Result], *args: object) -> Future[Result]:
    """Runs `function(*args)` in a thread of the pool, with the caller's context variables, which a thread does not
    inherit: by one of them an error names options or arguments."""
    return pool.submit(contextvars.copy_context().run, function, *args)


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Generator[Result, None, None]:
    """`function(item)` for every item, in order; at most `ahead` results are in memory. An error of an item is raised
    in place of its result. The function sees the caller's context variables. Closing the generator drops results that
    were computed ahead."""

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
