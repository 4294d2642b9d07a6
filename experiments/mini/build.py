"""Builds mini, the bundled model, from scratch: data, VAE, CLIP pair, UNet, adapters.

    python -m experiments.mini.build --out build/mini             runs at most 2 hours: repeat until it prints "done"
    python -m experiments.mini.build --out build/mini --minutes 8 runs at most 8 minutes

Every stage resumes from its own files in OUT, which may be moved to another machine. vae.py and clip.py train the VAE
and the CLIP pair. `ipadapter-jax encode` computes the features of the rendered scenes, and `ipadapter-jax train` trains
the UNet and the adapters on them, with the recipes mini_unet, mini and mini_plus. Needs the extras scenes and tfds.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.mini import clip, tokenizer, vae
from experiments.mini.cpu_devices import environment, use_cores
from experiments.mini.networks import (
    ENCODER,
    PREPROCESSOR,
    SCHEDULER,
    SIDE,
    TEXT_CONFIG,
    UNET_CONFIG,
    VAE_CONFIG,
    VISION_CONFIG,
)
from experiments.mini.render_scenes import render_scenes
from experiments.mini.run_settings import check_same
from ipadapter_jax import InputError
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.runtime import random_keys
from ipadapter_jax.runtime.compilation_cache import enable_compilation_cache
from ipadapter_jax.testing.random_weights import public_config, write_json, write_model_index
from ipadapter_jax.weights.component_export import save_component
from ipadapter_jax.weights.components import IMAGE_ENCODER, TEXT_ENCODER, UNET, VAE_COMPONENT, init_params

STEPS = {
    "vae-crops": 5000,
    "vae-whole": 600,
    "clip": 1300,
    "clip-attributes": 2500,
    "clip-vision": 1500,
    "unet": 6000,
    "mini": 2500,
    "mini_plus": 2500,
}
SCENES = 40_000
UNFINISHED = 75  # exit code of a preempted `ipadapter-jax train`: EX_TEMPFAIL


class TimeUp(Exception):
    """The time limit was reached; the next call resumes."""


def main(out: Path = Path("build/mini"), minutes: float = 115.0, share: float = 1.0) -> None:
    """Runs the remaining stages, for at most `minutes`.

    Args:
        share: fraction of the steps and scenes of every stage; 0.001 tests in minutes that all stages run.
    """
    use_cores()
    enable_compilation_cache()
    deadline = time.monotonic() + 60 * minutes
    steps = {name: max(round(share * count), 2) for name, count in STEPS.items()}
    scenes = max(round(share * SCENES), 200)
    stages: dict[str, Callable[[Path], object]] = {
        "tokenizer": tokenizer.write,
        "base": lambda part: _base(out, part, steps, deadline),
        "scenes": lambda part: render_scenes(part, {"train": scenes}),
    }
    try:
        check_same(out / "settings.json", {"steps": steps, "scenes": scenes})
        for name, make in stages.items():
            _stage(out / name, make)
        _networks(out, steps, deadline)
    except TimeUp:
        print(f"{out}: not finished; the same command goes on")
        raise SystemExit(UNFINISHED) from None
    except InputError as error:
        raise SystemExit(f"build_mini: {error}") from None
    print(f"{out}: done; experiments/mini/pack.py puts it into the package")


def _stage(target: Path, make: Callable[[Path], object]) -> None:
    """Calls `make` for a temporary folder and renames it to `target`. Does nothing if `target` exists."""
    if target.exists():
        return
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    make(part)
    part.rename(target)


def _base(out: Path, folder: Path, steps: dict[str, int], deadline: float) -> None:
    """Writes the base model, whose UNet has random weights, and the image encoder. Raises TimeUp at the deadline."""
    trained = vae.train(out, steps, deadline)
    pair = trained and clip.train(out, out / "tokenizer", steps, deadline)
    if not trained or not pair:
        raise TimeUp
    drawn = init_params(UNET, UNet(UNET_CONFIG), random_keys.key(0))
    for component, name, config, kind, params in (
        (VAE_COMPONENT, "vae", VAE_CONFIG, "AutoencoderKL", trained[1]),
        (TEXT_ENCODER, "text_encoder", TEXT_CONFIG, "CLIPTextModel", pair[1]["text"]),
        (IMAGE_ENCODER, str(ENCODER), VISION_CONFIG, "CLIPVisionModelWithProjection", pair[1]["vision"]),
        (UNET, "unet", UNET_CONFIG, "UNet2DConditionModel", drawn),
    ):
        text = json.dumps(public_config(config, kind), indent=2)
        save_component(component, folder / name, params, np.dtype(np.float16), text.encode())
    shutil.copytree(out / "tokenizer", folder / "tokenizer")
    write_json(folder / ENCODER / "preprocessor_config.json", PREPROCESSOR)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_model_index(folder, SCHEDULER)


def _networks(out: Path, steps: dict[str, int], deadline: float) -> None:
    """Runs the commands `encode` and `train`: precomputed features, the UNet, then an adapter of each variant."""
    base, whole = out / "base", out / "base-with-unet"
    _encode(out, "pooled", deadline)
    train("mini_unet", out / "unet", out / "pooled", base, steps["unet"], deadline)
    _stage(whole, lambda part: _with_unet(base, out / "unet" / "unet", part))
    for recipe, features in (("mini", "pooled"), ("mini_plus", "penultimate")):
        _encode(out, features, deadline)
        train(recipe, out / recipe, out / features, whole, steps[recipe], deadline)


def _encode(out: Path, features: str, deadline: float) -> None:
    data = next((out / "scenes").glob("**/dataset_info.json")).parent
    base = out / "base"
    options = ["--model", base, "--image-encoder", base / ENCODER, "--data", data, "--features", features]
    run(["encode", *options, "--out", out / features, "--resolution", SIDE, "--dtype", "float32"], deadline)


def train(recipe: str, folder: Path, cache: Path, base: Path, steps: int, deadline: float) -> None:
    places = ["--out", folder, "--data.path", cache, "--model.base", base, "--model.image-encoder", base / ENCODER]
    run(["train", recipe, "--steps", steps, *places], deadline)


def _with_unet(base: Path, unet: Path, target: Path) -> None:
    shutil.copytree(base, target)
    shutil.rmtree(target / "unet")
    shutil.copytree(unet, target / "unet")


def run(words: list[Any], deadline: float) -> None:
    """Runs `ipadapter-jax` with these arguments. At the deadline sends it SIGTERM and raises TimeUp."""
    print("ipadapter-jax", *words, flush=True)
    process = subprocess.Popen([sys.executable, "-m", "ipadapter_jax.cli", *map(str, words)], env=environment())
    try:
        code = process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        if code in (0, UNFINISHED, -signal.SIGTERM):
            raise TimeUp from None
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    tyro.cli(main)
