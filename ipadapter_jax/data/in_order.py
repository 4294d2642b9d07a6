"""Samples one after the other, loaded ahead by threads."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ipadapter_jax.data.batches import Samples, Skipped, usable


def in_order(
    samples: Samples, indices: Iterable[int], *, threads: int, ahead: int
) -> Generator[dict[str, np.ndarray] | Skipped, None, None]:
    """The samples of `indices` in that order, a Skipped in place of each that cannot be used; at most `ahead` of them
    are in memory. Closing the generator drops what was loaded ahead."""

    pool, loading = ThreadPoolExecutor(threads), deque[Future]()
    try:
        for index in indices:
            if len(loading) >= ahead:
                yield loading.popleft().result()
            loading.append(pool.submit(usable, samples, index))
        while loading:
            yield loading.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
