"""The whole of it without a network, PyTorch, TensorFlow and diffusers."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from experiments.mini.evaluate import write_clip, write_coco
from ipadapter_jax.train.export import ADAPTER
from tests.fault_injection.runs import environment, hold, prepare

# Run first: these are not to be found, as if they were not installed, and whoever reaches out gets an error.
ALONE = """
import importlib, importlib.machinery, socket, sys
MISSING = ("torch", "torchvision", "diffusers", "tensorflow")
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *more):
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, *more)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
for name in MISSING:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is found")
def no_network(*_, **__):
    raise OSError("the network was reached for")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = no_network
"""
_COMMANDS = """
import json
from ipadapter_jax.cli import main
for command in json.load(sys.stdin):
    print("then", *command[:1], file=sys.stderr)
    if code := main(command):
        sys.exit(code)
"""


@dataclasses.dataclass(frozen=True)
class Alone:
    """No network, no torch, no torchvision, no tensorflow, no diffusers: import, train, resume, sample, convert and
    evaluate pass."""

    def __call__(self, work: Path) -> str:
        commands = self._commands(work)
        given = json.dumps([[str(word) for word in command] for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", ALONE + _COMMANDS],
            env=environment(devices=1) | {"PYTHONSAFEPATH": "1"},
            input=given,
            capture_output=True,
            text=True,
        )
        hold(done.returncode == 0, f"it ended with {done.returncode}:\n{done.stderr[-3000:]}")
        made = [work / "run" / ADAPTER, work / "fox.png", work / "other.bin", work / "evaluation" / "evaluation.json"]
        hold(all(path.is_file() for path in made), f"not made: {[path for path in made if not path.is_file()]}")
        return f"{', '.join(str(command[0]) for command in commands)}: all pass with neither network nor peers"

    def _commands(self, work: Path) -> list[list[object]]:
        config = prepare(work, steps=4, save_every=2)
        recipe = work / "recipe.py"
        recipe.write_text(f"from ipadapter_jax.train.config import *\n\nconfig = {config!r}\n")
        annotations = write_coco(work / "coco", 2)
        write_clip(work / "clip")
        adapter, image, size = (
            work / "run" / ADAPTER,
            work / "images" / "000.png",
            ["--height", "8", "--width", "8"],
        )
        encoder = ["--image-encoder", config.model.image_encoder]
        scoring = ["--image-root", work / "coco" / "val2017", "--clip", work / "clip", "--num-images", "1"]
        return [
            ["train", recipe, "--steps", "2"],
            ["train", recipe],
            ["generate", "--model", config.model.base, "--adapter", adapter, *encoder, "--image", image, *size]
            + ["--steps", "2", "--out", work / "fox.png"],
            ["convert", adapter, work / "other.bin"],
            ["evaluate", annotations, *scoring, "--steps", "2", "--out", work / "evaluation"],
        ]
