"""The effect of half precision on the latents after a whole run, here and in PyTorch diffusers, with the same weights.

    python -m ipadapter_jax.testing.random_weights --size full --out weights/full
    python -m benchmarks.compare_bfloat16 --weights weights/full                            NVIDIA GPU: 512 px, 50 steps
    python -m benchmarks.compare_bfloat16 --weights weights/full --height 64 --width 64     CPU: half an hour

Both sides sample the same image in float32 and in --dtype, one process after the other. The error of a side is the
relative difference, in the 2-norm, between its half-precision and its own float32 result. The exit code is 1 if ours is
larger than --limit times PyTorch's. Needs the extra `torch`.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from benchmarks.compare_with_diffusers import photograph, require_peers
from benchmarks.sample_worker import Ours, Settings, Torch

SIDES: dict[str, Any] = {"ours": Ours, "PyTorch": Torch}


@dataclasses.dataclass(frozen=True)
class Comparison(Settings):
    """Compares the error of half precision with PyTorch's."""

    dtype: Any = "bfloat16"
    guidance_scale: float = 7.5
    limit: Annotated[float, tyro.conf.arg(help="our error / PyTorch's")] = 1.0


def latents(side: str, settings: Settings) -> np.ndarray:
    """Final latents (B, h, w, 4) of one side. Runs in a process of its own, which ends with its memory."""
    assert settings.image is not None
    runner = SIDES[side](settings, Image.open(settings.image))
    runner.imports()
    runner.load()
    if side == "PyTorch":
        return runner.latents()
    prompts = {"ip_adapter_image": runner.reference, "ip_adapter_scale": settings.scale, **settings.words}
    ours = {"output_type": "latent", "progress_bar": False, **settings.call}
    return runner.pipe(**prompts, latents=settings.noise, **ours)


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """In the 2-norm; infinite where anything is not finite."""
    error = np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact.astype(np.float64))
    return float(error) if np.isfinite(error) else float("inf")


def compare(settings: Comparison) -> dict[str, float]:
    """The error of half precision by side, and under "float32" how far both are apart there."""
    spawn, found = multiprocessing.get_context("spawn"), {}
    given: dict[str, Any] = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)}
    for side in SIDES:
        for dtype in ("float32", settings.dtype):
            one: dict[str, Any] = {**given, "dtype": dtype}
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as alone:
                found[side, dtype] = alone.submit(latents, side, Settings(**one)).result()
    errors = {side: relative_error(found[side, settings.dtype], found[side, "float32"]) for side in SIDES}
    return errors | {"float32": relative_error(found["ours", "float32"], found["PyTorch", "float32"])}


def main(settings: Comparison) -> int:
    require_peers()
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "image.png")
        photograph(settings.image).save(image)
        errors = compare(dataclasses.replace(settings, image=image))
    ratio = errors["ours"] / errors["PyTorch"]
    what = f"{settings.dtype} against float32, relative error"
    lines = [
        f"| latents after {settings.steps} steps, {settings.width}x{settings.height} | ours | PyTorch | ratio |",
        "|---|---:|---:|---:|",
        f"| {what} | {errors['ours']:.2e} | {errors['PyTorch']:.2e} | {ratio:.2f} |",
        f"| float32 against PyTorch's | {errors['float32']:.1e} | | |",
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if settings.out is not None:
        settings.out.write_text(text, encoding="utf-8")
    return 0 if ratio <= settings.limit else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Comparison)))
