"""Recorded noise instead of random draws."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.validation import to_float32
from ipadapter_jax.pipelines.noise import GivenNoise, offered


@contextlib.contextmanager
def given_noise(
    posterior: object = None, initial: object = None, steps: Sequence[object] = (), *, masked_posterior: object = None
) -> Iterator[None]:
    """Inside the block, the next call of a pipeline uses this noise instead of random draws.

        with given_noise(initial=recorded["latents"], steps=[recorded[f"noise_{i}"] for i in range(5)]):
            images = pipe("a cat", scheduler="euler_a", num_inference_steps=5)

    Each is an array of standard normal numbers, (images, height and width of the latents, channels):
    posterior: of the VAE's posterior from which the latents of `image` are drawn.
    initial: the noise that a call begins with; what the argument `latents` of a call is, and refused beside it.
    steps: of the steps of a stochastic sampler (ddpm, euler_a, lcm, or ddim with eta), one array for each in order.
    Those of the last steps may be left out where these add no noise, as the last step of lcm.
    masked_posterior: of the posterior of the masked image, which inpainting models alone are shown.
    What is left out is drawn from the seeds of the call, as outside of the block.

    The numbers are arguments of the compiled programs, so a call inside the block compiles nothing that a call outside
    does not, and later calls do not see them. The block holds for its own thread and asyncio task; another thread draws
    at random, unless it runs in a copy of this one's context (contextvars.copy_context).

    Raises InputError, before anything is compiled, for an array of another shape, for too few or too many steps, and
    for noise that the call does not use. Raises it too for a second call in one block, and at the end of a block in
    which no pipeline was called.
    """
    named = {"posterior": posterior, "masked_posterior": masked_posterior, "initial": initial}
    arrays = {name: _array(value, name) for name, value in named.items() if value is not None}
    try:
        listed = list(steps)
    except TypeError:
        raise InputError(f"given_noise: steps must be a list of arrays, one for each step, not {steps!r}") from None
    found = tuple(_array(value, f"steps[{number}]") for number, value in enumerate(listed))
    with offered(GivenNoise(**arrays, steps=found)):
        yield


def _array(value: object, name: str) -> np.ndarray:
    return to_float32(value, f"given_noise: {name}")
