"""Runs an evaluation of the bundled model twice, once with kills, and compares the results.

    python -m experiments.mini.evaluate                                    200 held-out scenes x 4, 10 steps
    python -m experiments.mini.evaluate --prompts 20 --steps 4 --kills 1

The scenes are stored like COCO's validation set and scored with mini's own CLIP, its two encoders joined into one
CLIPModel. In one run `ipadapter-jax evaluate` is killed (kill -9) while it generates images and while it scores them.
The files of results must be equal byte for byte. These scores cannot be compared with those of another CLIP.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from experiments.mini.cpu_devices import environment
from experiments.mini.scenes.captions import caption
from experiments.mini.scenes.scene import generator
from experiments.mini.test_scenes import prompt
from ipadapter_jax.weights import bundled
from ipadapter_jax.weights.component_export import save_component
from ipadapter_jax.weights.components import IMAGE_ENCODER, TEXT_ENCODER, WHOLE_CLIP
from ipadapter_jax.weights.open_component import load_component

_WORDS = 17  # a stream of random numbers that no data set uses
TABLES = ("evaluation.json", "prompts.csv", "pictures.csv")


@dataclasses.dataclass(frozen=True)
class Run:
    """The size of the evaluation, and how often it is killed."""

    out: Path = Path("build/evaluate-mini")
    prompts: int = 200
    num_images: int = 4
    steps: int = 10
    kills: int = 2
    """Number of kills while images are generated, evenly spaced; one more follows while they are scored."""


def write_clip(folder: Path) -> None:
    """Writes mini's two encoders as one CLIPModel. The text projection is the identity, because the pooled state of
    mini's text encoder is the embedding."""
    text, vision = (
        load_component(component, bundled.FOLDER / name, np.dtype(np.float32))
        for component, name in ((TEXT_ENCODER, "text_encoder"), (IMAGE_ENCODER, "image_encoder"))
    )
    width = vision.module.config.projection_dim
    params = {**text.params, **vision.params, "text_projection": {"kernel": np.eye(width, dtype=np.float32)}}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": width,
        "text_config": dataclasses.asdict(text.module.config),
        "vision_config": dataclasses.asdict(vision.module.config),
    }
    save_component(WHOLE_CLIP, folder, params, np.dtype(np.float32), json.dumps(config, indent=2).encode())
    shutil.copytree(bundled.FOLDER / "tokenizer", folder, dirs_exist_ok=True)


def write_coco(folder: Path, count: int) -> Path:
    """Writes held-out scenes in COCO's layout. Of the two captions of each, the first names all attributes. Returns the
    path of the annotations."""
    image_folder, annotations = folder / "val2017", folder / "annotations" / "captions_val2017.json"
    image_folder.mkdir(parents=True, exist_ok=True)
    annotations.parent.mkdir(exist_ok=True)
    images, captions = [], []
    for index in range(count):
        made = prompt(index)
        name = f"{index:012d}.png"
        Image.fromarray(made.pixels).save(image_folder / name)
        images.append({"id": index, "file_name": name, "height": 64, "width": 64})
        for text in (made.caption, caption(made.scene, generator("held_out", index, _WORDS))):
            captions.append({"id": len(captions), "image_id": index, "caption": text})
    annotations.write_text(json.dumps({"info": {}, "images": images, "annotations": captions}), encoding="utf-8")
    return annotations


def command(args: Run, annotations: Path, clip: Path, out: Path) -> list[str]:
    options: dict[str, Any] = {
        "out": out,
        "image-root": annotations.parents[1] / "val2017",
        "clip": clip,
        "num-images": args.num_images,
        "steps": args.steps,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "ipadapter_jax.cli", "evaluate", str(annotations), *words]


def killed_when(words: list[str], env: dict[str, str], folder: Path, pattern: str, count: int) -> bool:
    """Starts the command and kills it when `count` files match. Returns False if it ended before."""
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len([*folder.glob(pattern)]) < count:
        time.sleep(0.02)
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


def finished(words: list[str], env: dict[str, str]) -> float:
    """Runs the command and returns its seconds. Ends the program if it fails."""
    began = time.monotonic()
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr[-3000:]}")
    print(done.stdout, end="")
    return time.monotonic() - began


def main(args: Run) -> int:
    """Returns 0 if both runs give the same results and all kills took place, else 1."""
    clip, annotations = args.out / "clip", write_coco(args.out / "coco", args.prompts)
    write_clip(clip)
    env = os.environ | environment()
    whole, disturbed = args.out / "undisturbed", args.out / "disturbed"
    for folder in (whole, disturbed):
        shutil.rmtree(folder, ignore_errors=True)
    seconds = finished(command(args, annotations, clip, whole), env)
    words = command(args, annotations, clip, disturbed)
    images = args.prompts * args.num_images
    kills = [("images", "*.png", max(1, images * k // (args.kills + 1))) for k in range(1, args.kills + 1)]
    kills.append(("scores", "*.safetensors", 1))
    died = [killed_when(words, env, disturbed / folder, pattern, count) for folder, pattern, count in kills]
    finished(words, env)
    equal = {name: (whole / name).read_bytes() == (disturbed / name).read_bytes() for name in TABLES}
    print(f"{images} images of {args.steps} steps made and scored in {seconds:.0f} s; {sum(died)} kills")
    print(", ".join(f"{name}: {'equal' if same else 'DIFFERENT'}" for name, same in equal.items()))
    return 0 if all(equal.values()) and all(died) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Run)))
