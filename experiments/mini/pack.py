"""Copies the model of build.py into the package: float16 weights, digests, and a summary of the stages' logs.

python -m experiments.mini.pack --build build/mini
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from experiments.mini.scenes.render import render
from experiments.mini.scenes.scene import make_scene
from ipadapter_jax.testing.random_weights import write_json

TARGET = Path(__file__).parents[2] / "ipadapter_jax" / "mini"
LOGS = {  # by stage, the file of its losses
    "VAE, crops of 32 px": "vae-crops/log.jsonl",
    "VAE, whole images": "vae-whole/log.jsonl",
    "CLIP pair, contrast": "clip/log.jsonl",
    "CLIP pair, with heads": "clip-attributes/log.jsonl",
    "CLIP vision alone": "clip-vision/log.jsonl",
    "UNet": "unet/metrics.jsonl",
    "adapter, base": "mini/metrics.jsonl",
    "adapter, plus": "mini_plus/metrics.jsonl",
}
ADAPTERS = {"mini": "ip-adapter_mini.safetensors", "mini_plus": "ip-adapter-plus_mini.safetensors"}
REFERENCE = 3  # index of the held-out scene that is the sample image prompt
MOST_BYTES = 16_000_000


def main(build: Path = Path("build/mini"), target: Path = TARGET) -> None:
    """Replaces the folder `target`. Ends the program if a stage of the build is not finished."""
    logs = {name: summary(build / log) for name, log in LOGS.items()}
    steps = json.loads((build / "settings.json").read_text())["steps"]
    for name, log in LOGS.items():
        wanted, made = steps[Path(log).parent.name], logs[name]["steps"]
        if made != wanted:
            raise SystemExit(f"{build}: {name} has made {made} of {wanted} steps; go on with experiments/mini/build.py")
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(build / "base-with-unet", part)
    for run, name in ADAPTERS.items():
        shutil.copy(build / run / "adapter.safetensors", part / name)
    Image.fromarray(render(make_scene("held_out", REFERENCE, 1), 256)).save(part / "reference.png")
    if (card := target / "README.md").exists():
        shutil.copy(card, part)
    write_json(part / "training.json", logs)
    files = sorted(path for path in part.rglob("*") if path.is_file())
    for path in files:
        path.chmod(0o644)  # safetensors makes files that only their owner can read, also after installation
    digests = {str(path.relative_to(part)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    write_json(part / "digests.json", digests)
    if (size := sum(path.stat().st_size for path in part.rglob("*.safetensors"))) > MOST_BYTES:
        raise SystemExit(f"{part}: {size:,} bytes of weights, more than {MOST_BYTES:,}")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    print(f"{target}: {size:,} bytes of weights")


def summary(log: Path) -> dict[str, Any]:
    """The steps of a stage, and its mean losses over the first and the last tenth."""
    if not log.exists():
        raise SystemExit(f"{log} is missing: make it with experiments/mini/build.py")
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    losses = [line["loss"] for line in lines]
    tenth = max(len(losses) // 10, 1)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return {"steps": lines[-1]["step"], "loss_of_first_tenth": round(first, 5), "loss_of_last_tenth": round(last, 5)}


if __name__ == "__main__":
    tyro.cli(main)
