"""Bytes that a call cannot do without, held against the memory of the machine before anything is read or compiled."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ipadapter_jax.errors import InputError

_FLOAT = 4


class _Arrays(NamedTuple):
    """How many arrays of a network's longest layer lie in memory at once, at least."""

    decoder: int
    denoiser: int


_ON_CPU = _Arrays(7, 12)  # in XLA's plans in float32: 7, and 18 to 45
_FUSED = _Arrays(3, 4)  # accelerators keep fewer
_PIXELS = 2
_WORK = 400  # bytes of one image that a job plans
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def machine_memory() -> int | None:
    """Bytes of this machine, or of the container that this process may use; None where the system does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None
    try:
        return min(total, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total


def check_sampling_memory(
    unet: Any, vae: Any, images: int, points: tuple[int, int], run: Any, devices: Iterable[Any], *, guided: bool
) -> None:
    """Raises InputError when sampling so many images of latents of (h, w) points takes more than there is.

    unet, vae: the networks, or what has their `config` and `dtype`. run: the sampler's, whose steps say whether they
    need noise. devices: of jax.
    """
    memory = device_memory(devices)
    arrays = _FUSED if memory else _ON_CPU
    scale, itemsize = vae.config.downscale, np.dtype(vae.dtype).itemsize
    height, width, latents = points[0] * scale, points[1] * scale, points[0] * points[1]
    rows = images * (2 if guided else 1)
    decoder = arrays.decoder * height * width * vae.config.block_out_channels[0] * itemsize  # one image at a time
    denoiser = arrays.denoiser * rows * latents * unet.config.block_out_channels[0] * itemsize
    draws = 2 + (len(run.steps.noise) if np.any(run.steps.noise) else 0)  # stochastic samplers have one for each step
    noises = draws * images * latents * vae.config.latent_channels * _FLOAT
    pixels = _PIXELS * images * height * width * 3 * _FLOAT
    needed = max(decoder, denoiser) + noises + pixels
    some, fewer = ("an image", "") if images == 1 else (f"{images:,} images", ", or make fewer images at once")
    check_memory(needed, f"{some} of {width} x {height} pixels", f"choose a smaller size{fewer}", memory)


def check_memory(needed: int, what: str, remedy: str, available: int | None = None) -> None:
    """Raises InputError, saying the bytes, when `what` needs more than is `available`, by default in this machine."""
    available = machine_memory() if available is None else available
    if available is not None and needed > available:
        raise InputError(
            f"{what} would need at least {needed / 1e9:,.1f} GB of memory ({needed:,} bytes), and there are "
            f"{available / 1e9:,.1f} GB; {remedy}"
        )


def check_job_memory(rows: int, images: int) -> None:
    """Raises InputError for a job of more images than can be planned in memory."""
    check_memory(rows * images * _WORK, f"a job of {rows * images:,} images", "give a smaller --num-images")


def device_memory(devices: Iterable[Any]) -> int | None:
    """Bytes of all devices together, where they say so; a CPU does not."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return sum(limit for limit in limits if limit) if limits and all(limits) else None
