"""A bar for the steps of a call, where somebody watches."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


def is_interactive() -> bool:
    """Whether standard error is a terminal, or this is a notebook."""
    return bool(sys.stderr and sys.stderr.isatty()) or "ipykernel" in sys.modules


@contextlib.contextmanager
def step_bar(wanted: bool, total: int, callback: Callable | None) -> Iterator[Callable | None]:
    """What is to be called after every step with its number, its timestep and the latents: `callback`, and what moves a
    bar if one is `wanted` and watched. None where neither is there, so that all steps can be one call."""
    if not (wanted and is_interactive()):
        yield callback
        return
    import tqdm.auto

    with tqdm.auto.tqdm(total=total, desc="compiling, then sampling", unit="step") as bar:

        def on_step(number: int, timestep: float, latents: Any) -> None:
            latents.block_until_ready()
            bar.set_description("sampling", refresh=False)
            bar.update()
            if callback is not None:
                callback(number, timestep, latents)

        yield on_step
