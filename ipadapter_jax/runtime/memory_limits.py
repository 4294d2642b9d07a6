"""Compares the least memory that a call needs with that of the machine, before anything is read or compiled."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from ipadapter_jax.errors import InputError
from ipadapter_jax.inputs.validation import LatentShape

if TYPE_CHECKING:  # the command line reads settings of training before it imports jax
    from ipadapter_jax.diffusion.samplers import SamplerRun

_FLOAT = 4


class _UNetSizes(Protocol):
    @property
    def block_out_channels(self) -> tuple[int, ...]: ...


class _VAESizes(_UNetSizes, Protocol):
    @property
    def latent_channels(self) -> int: ...
    @property
    def downscale(self) -> int: ...


class _Device(Protocol):
    def memory_stats(self) -> Mapping[str, int] | None: ...


class _Arrays(NamedTuple):
    """The least number of arrays of a network's largest layer that are in memory at the same time."""

    decoder: int
    denoiser: int


_ON_CPU = _Arrays(7, 12)  # in the buffer assignments of XLA in float32: 7, and 18 to 45
_FUSED = _Arrays(3, 4)  # accelerators keep fewer
_PIXELS = 2
_TASK = 400  # bytes of one planned image of a job
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def machine_memory() -> int | None:
    """Bytes of this machine, or of the container that this process may use; None if the system does not report it."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not available on every system
        return None
    try:
        return min(total, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total


def check_sampling_memory(
    unet: _UNetSizes,
    vae: _VAESizes,
    dtype: DTypeLike,
    images: int,
    latents: LatentShape,
    run: "SamplerRun",
    devices: Iterable[_Device],
    *,
    guided: bool,
) -> None:
    """Raises InputError when sampling needs more memory than there is.

    dtype: of both networks. run: its steps say whether they add noise.
    """
    memory = device_memory(devices)
    arrays = _FUSED if memory else _ON_CPU
    scale, itemsize = vae.downscale, np.dtype(dtype).itemsize
    height, width, points = latents.height * scale, latents.width * scale, latents.height * latents.width
    batch = images * (2 if guided else 1)
    decoder = arrays.decoder * height * width * vae.block_out_channels[0] * itemsize  # one image at a time
    denoiser = arrays.denoiser * batch * points * unet.block_out_channels[0] * itemsize
    draws = 2 + (len(run.steps.noise) if np.any(run.steps.noise) else 0)  # stochastic samplers draw noise for each step
    noises = draws * images * points * vae.latent_channels * _FLOAT
    pixels = _PIXELS * images * height * width * 3 * _FLOAT
    needed = max(decoder, denoiser) + noises + pixels
    some, fewer = ("an image", "") if images == 1 else (f"{images:,} images", ", or make fewer images at once")
    check_memory(needed, f"{some} of {width} x {height} pixels", f"choose a smaller size{fewer}", memory)


def check_memory(needed: int, what: str, remedy: str, available: int | None = None) -> None:
    """Raises InputError that states the bytes when `what` needs more than is `available`, by default in this
    machine."""
    available = machine_memory() if available is None else available
    if available is not None and needed > available:
        raise InputError(
            f"{what} would need at least {needed / 1e9:,.1f} GB of memory ({needed:,} bytes), and there are "
            f"{available / 1e9:,.1f} GB; {remedy}"
        )


def check_job_memory(rows: int, images: int) -> None:
    """Raises InputError for a job of more images than fit in memory as planned tasks."""
    check_memory(rows * images * _TASK, f"a job of {rows * images:,} images", "give a smaller --num-images")


def device_memory(devices: Iterable[_Device]) -> int | None:
    """Bytes of all devices together; None if they do not report it, such as a CPU."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return sum(limit for limit in limits if limit) if limits and all(limits) else None
