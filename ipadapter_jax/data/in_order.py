"""Samples one after the other, loaded ahead by threads."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ipadapter_jax.data.batches import Samples, Skipped
from ipadapter_jax.errors import InputError


def in_order(
    samples: Samples, indices: Iterable[int], *, threads: int, ahead: int
) -> Generator[dict[str, np.ndarray] | Skipped, None, None]:
    """The samples of `indices` in that order, a Skipped in place of each that cannot be used; at most `ahead` of them
    are in memory. Closing the generator drops what was loaded ahead."""

    def load(index: int) -> dict[str, np.ndarray] | Skipped:
        try:
            return samples[index]
        except Exception as error:  # InputError, or whatever else a damaged record brings a reader to raise
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            return Skipped(index, samples.key(index), " ".join(f"{kind}{error}".split())[:300])

    pool, loading = ThreadPoolExecutor(threads), deque[Future]()
    try:
        for index in indices:
            if len(loading) >= ahead:
                yield loading.popleft().result()
            loading.append(pool.submit(load, index))
        while loading:
            yield loading.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
