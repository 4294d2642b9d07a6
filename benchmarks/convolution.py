"""3x3 convolutions here, by XLA's own implementation and in PyTorch, for the shapes of Stable Diffusion 1.5 at 512 px.
The last shapes are convolutions after nearest-neighbor upsampling.

    python -m benchmarks.convolution --backward                     CPU, as in a training step of one sample
    python -m benchmarks.convolution --batch 2                      CPU, as in a guided denoising step

All run in this process, in turns, on the same numbers in float32; the medians are printed. Before a shape is timed, all
results must agree. Needs the extra `torch`.
"""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.compare_with_diffusers import require_peers
from benchmarks.interleaved_timing import seconds_in_turns
from ipadapter_jax.ops.upsample_conv import convolve_upsampled, upsample_nearest

UNET = ((64, 320, 320), (64, 960, 320), (64, 640, 640), (32, 320, 640), (32, 640, 640), (32, 1920, 640))
UNET += ((32, 1280, 1280), (16, 1280, 1280), (16, 2560, 1280), (8, 1280, 1280))  # side, channels in, channels out
VAE = ((64, 512, 512), (128, 512, 512), (256, 256, 256), (512, 128, 128))
DOUBLED = {"UNet": ((8, 1280, 1280), (16, 1280, 1280), (32, 640, 640)), "VAE": ((64, 512, 512), (128, 512, 512))}
NUMBERS = ("NHWC", "HWIO", "NHWC")
TOLERANCE = 1e-4  # of outputs with a standard deviation of 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """Prints one table."""

    batch: Annotated[int, tyro.conf.arg(help="rows; guidance makes two of an image")] = 1
    backward: Annotated[bool, tyro.conf.arg(help="the gradient by the input alone, as for frozen weights")] = False
    rounds: int = 7


def plainly(height: int, width: int, x: Any, kernel: Any) -> Any:
    """As it is written down, XLA doing the rest."""
    x = x if x.shape[1:3] == (height, width) else upsample_nearest(x, height, width)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NUMBERS)


def in_torch(image: Any, weights: Any, wanted: Any, backward: bool) -> Any:
    """PyTorch's output (B, h, w, C'), or its gradient by the input, the backward pass of a frozen layer."""
    import torch
    from torch.nn.grad import conv2d_input

    times = wanted.shape[2] // image.shape[2]
    size = (*image.shape[:2], *wanted.shape[2:])
    if backward:
        found = conv2d_input(size, weights, wanted, padding=1)
        found = found if times == 1 else torch.nn.functional.avg_pool2d(found, 2, divisor_override=1)
    else:
        image = image if times == 1 else torch.nn.functional.interpolate(image, scale_factor=2.0, mode="nearest")
        found = torch.nn.functional.conv2d(image, weights, padding=1)
    return found.permute(0, 2, 3, 1)


def sides(settings: Settings, side: int, channels: int, features: int, size: int) -> dict[str, Callable[[], Any]]:
    """Each way's outputs (B, size, size, C'), or with `backward` its gradient by the input, on the same numbers."""
    import torch

    rng = np.random.default_rng(0)
    x = rng.standard_normal((settings.batch, side, side, channels), np.float32)
    kernel = rng.standard_normal((3, 3, channels, features), np.float32) / np.sqrt(9 * channels, dtype=np.float32)
    by_output = rng.standard_normal((settings.batch, size, size, features), np.float32)

    def in_jax(form: Callable[..., Any]) -> Callable[[], Any]:
        plain = functools.partial(form, size, size)

        @jax.jit
        def run(x: Any, kernel: Any, by_output: Any) -> Any:
            return jax.vjp(lambda x: plain(x, kernel), x)[1](by_output)[0] if settings.backward else plain(x, kernel)

        given = [jnp.asarray(a) for a in (x, kernel, by_output)]
        return lambda: jax.block_until_ready(run(*given))

    # Its gradient takes as long from one layout as from the other, so both get their own.
    image, weights, wanted = (torch.from_numpy(a) for a in (x, kernel, by_output))
    image, wanted = (a.permute(0, 3, 1, 2).contiguous() for a in (image, wanted))
    weights = weights.permute(3, 2, 0, 1).contiguous()
    theirs = functools.partial(in_torch, image, weights, wanted, settings.backward)
    ours = functools.partial(convolve_upsampled, dimension_numbers=NUMBERS)
    return {"ours": in_jax(ours), "XLA's": in_jax(plainly), "PyTorch": theirs}


def main(settings: Settings) -> None:
    require_peers()
    print("| positions, channels | ours, ms | XLA's, ms | PyTorch, ms | XLA's / ours | PyTorch / ours |")
    print("|---|---:|---:|---:|---:|---:|")
    for times, shapes in ((1, {"UNet": UNET, "VAE": VAE}), (2, DOUBLED)):
        for network, (side, channels, features) in ((name, one) for name, some in shapes.items() for one in some):
            runs = sides(settings, side, channels, features, times * side)
            ours, *others = (np.asarray(run()) for run in runs.values())  # which also warms up
            if not all(abs(ours - other).max() < TOLERANCE for other in others):
                sys.exit(f"no numbers: the sides differ at {side}x{side} positions, {channels} to {features} channels")
            found = seconds_in_turns(runs, settings.rounds).values()
            ours, xla, theirs = (1e3 * statistics.median(seconds) for seconds in found)
            name = f"{network}, {side}x{side}, {channels} to {features}{', doubled' if times == 2 else ''}"
            print(f"| {name} | {ours:.1f} | {xla:.1f} | {theirs:.1f} | {xla / ours:.2f} | {theirs / ours:.2f} |")
    what = "gradient by the input" if settings.backward else "forward"
    print(f"\n- {jax.devices()[0].device_kind}, float32, batch {settings.batch}, {what}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
