"""A progress bar for the steps of a call, in a terminal or a notebook."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from jax import Array


def is_interactive() -> bool:
    """Whether standard error is a terminal, or this is a notebook."""
    return bool(sys.stderr and sys.stderr.isatty()) or "ipykernel" in sys.modules


@contextlib.contextmanager
def step_bar(wanted: bool, total: int, callback: Callable | None) -> Iterator[Callable | None]:
    """The function to call after every step with its number, its timestep and the latents: it calls `callback` and
    moves a progress bar, if one is `wanted` and somebody can see it. None without both, so that all steps can be one
    call."""
    if not (wanted and is_interactive()):
        yield callback
        return
    import tqdm.auto

    with tqdm.auto.tqdm(total=total, desc="compiling, then sampling", unit="step") as bar:

        def on_step(number: int, timestep: float, latents: Array) -> None:
            latents.block_until_ready()
            bar.set_description("sampling", refresh=False)
            bar.update()
            if callback is not None:
                callback(number, timestep, latents)

        yield on_step
