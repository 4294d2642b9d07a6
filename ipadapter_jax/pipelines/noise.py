"""The numbered random draws of one call of a pipeline, and how `ipadapter_jax.testing.given_noise` replaces them.

Each is standard normal, (B, h, w, C) for B images: number 0 is the initial noise, number 1 + i the noise of step i, and
two at the end of 32 bits are the noise of the VAE's posteriors.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar

import numpy as np

from ipadapter_jax.errors import InputError

INITIAL, POSTERIOR, MASKED_POSTERIOR = 0, 2**32 - 2, 2**32 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class GivenNoise:
    """Draws for one call. What is None, or without steps, is drawn from the seeds of the call as usual."""

    posterior: np.ndarray | None = None
    masked_posterior: np.ndarray | None = None
    initial: np.ndarray | None = None
    steps: tuple[np.ndarray, ...] = ()

    def by_number(
        self, encoded: frozenset[int], initial: bool, deviations: np.ndarray, shape: tuple[int, ...]
    ) -> dict[int, np.ndarray]:
        """The draws by their number, for a call of `shape` (B, h, w, C) that draws the posteriors in `encoded`, the
        `initial` noise or not, and adds noise of these standard deviations, one for each step. Raises InputError for
        draws of another shape or number, and for those that the call does not use."""
        named = {INITIAL: self.initial, POSTERIOR: self.posterior, MASKED_POSTERIOR: self.masked_posterior}
        made = encoded | ({INITIAL} if initial else set())
        found = {number: array for number, array in named.items() if array is not None}
        for number in found:
            if number not in made:
                name, why = _UNUSED[number]
                raise InputError(f"given_noise: this call does not use {name}: {why}; leave it out")
        if self.steps:
            _check_number(len(self.steps), deviations)
            found |= {1 + step: array for step, array in enumerate(self.steps)}
        for number, array in found.items():
            if array.shape != shape:
                name = _UNUSED[number][0] if number in _UNUSED else f"steps[{number - 1}]"
                raise InputError(
                    f"given_noise: {name} has shape {array.shape}, this call needs {shape}: images, height and width "
                    "of the latents, channels"
                )
        return found


_UNUSED = {
    INITIAL: ("initial", "its initial noise is the argument latents"),
    POSTERIOR: ("posterior", "it encodes no image to begin with"),
    MASKED_POSTERIOR: ("masked_posterior", "it encodes no masked image, which only inpainting models are shown"),
}


def _check_number(given: int, deviations: np.ndarray) -> None:
    """One draw for each step; those after the last step that adds noise may be left out."""
    least, most = np.flatnonzero(deviations).max(initial=-1) + 1, len(deviations)
    if not least:
        raise InputError("given_noise: this call does not use steps: its scheduler adds no noise; leave them out")
    if not least <= given <= most:
        wanted = f"{least}" if least == most else f"{least} or {most}" if most - least == 1 else f"{least} to {most}"
        raise InputError(f"given_noise: steps holds {given} draws; this call makes {most} steps: give {wanted}")


@dataclasses.dataclass(eq=False)
class _Offer:
    """Noise for the first call that takes it."""

    noise: GivenNoise
    taken: bool = False


_OFFER: ContextVar[_Offer | None] = ContextVar("given_noise", default=None)


@contextlib.contextmanager
def offered(noise: GivenNoise) -> Iterator[None]:
    """Inside, the first call of a pipeline takes this noise. Raises InputError at the end where no call took it."""
    offer = _Offer(noise)
    before = _OFFER.set(offer)
    try:
        yield
    finally:
        _OFFER.reset(before)
    if not offer.taken:
        raise InputError("given_noise: no pipeline was called inside the block; call one there, in the same thread")


def taken_noise() -> GivenNoise:
    """What is offered to this call; nothing where it is called outside of `offered`. Raises InputError where an earlier
    call took it."""
    offer = _OFFER.get()
    if offer is None:
        return GivenNoise()
    if offer.taken:
        raise InputError("given_noise: an earlier call inside the block used the draws; open one block for each call")
    offer.taken = True
    return offer.noise
