"""The cost of masks, scales by layer and a second adapter in a denoising step.

    python -m ipadapter_jax.testing.random_weights --size full --out weights/full
    python -m benchmarks.controls --weights weights/full --size 256

Compares a guided step with one adapter and one number as its scale to a step with two adapters, each with a mask and a
scale for every layer. Both are compiled first and then timed in turns; the medians and their ratio are printed.
"""

import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from benchmarks.interleaved_timing import seconds_in_turns
from ipadapter_jax import Scale, StableDiffusion
from ipadapter_jax.models.unet_config import cross_attention_layers
from ipadapter_jax.pipelines import programs

GOAL = 1.10


def main(
    weights: Annotated[Path, tyro.conf.arg(help="a folder of random_weights.py")],
    size: Annotated[int, tyro.conf.arg(help="side of the image in pixels")] = 512,
    dtype: str = "float32",
    runs: Annotated[int, tyro.conf.arg(help="of which the median is shown")] = 5,
) -> int:
    """Prints both times of a step and their ratio."""
    pipe = StableDiffusion.from_pretrained(weights, dtype=dtype)
    adapter = weights / "ip_adapter" / "models" / "ip-adapter_sd15.safetensors"
    one = pipe.with_ip_adapter(adapter)
    two = one.with_ip_adapter(adapter)
    layers = np.linspace(0.1, 1, len(cross_attention_layers(pipe.unet.config))).tolist()
    left = np.zeros((size, size))
    left[:, : size // 2] = 1
    image = np.zeros((224, 224, 3))
    scales, masks = [Scale(0.6, layers), Scale(0.8, layers[::-1])], [[left], [1 - left]]
    settings: dict[str, Any] = {"height": size, "width": size, "num_inference_steps": 1, "output_type": "latent"}
    calls = {
        "one adapter, one scale": _step(one, ip_adapter_image=image, ip_adapter_scale=0.6, **settings),
        "two adapters, masks, scales by layer": _step(
            two, ip_adapter_image=[image, image], ip_adapter_scale=scales, ip_adapter_masks=masks, **settings
        ),
    }
    medians = [statistics.median(seconds) for seconds in seconds_in_turns(calls, runs).values()]
    for name, seconds in zip(calls, medians, strict=True):
        print(f"{name}: {seconds:.3f} s a step")
    print(f"ratio: {medians[1] / medians[0]:.3f} (goal: at most {GOAL})")
    return 0


class _step:
    """The jitted call of one step of a pipeline's call, to be repeated."""

    def __init__(self, pipe: StableDiffusion, **arguments: Any):
        self._real, self._given = programs.denoise, ()
        programs.denoise = self._recorded  # type: ignore[assignment]
        try:
            pipe("", progress_bar=False, **arguments)
        finally:
            programs.denoise = self._real

    def _recorded(self, *given: Any) -> Any:
        self._given = given
        return self._real(*given)

    def __call__(self) -> Any:
        return jax.block_until_ready(self._real(*self._given))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
