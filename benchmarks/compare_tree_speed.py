"""Shows that a refactoring costs no time: runs the same commands in two revisions, in turns, and prints the ratio.

    python -m benchmarks.compare_tree_speed main                      # a revision with the working tree
    python -m benchmarks.compare_tree_speed v0.1 main --rounds 9
    python -m benchmarks.compare_tree_speed main --model weights/full --steps 1 3 --train-steps 1 3 --size 256

Every revision is one process, with an empty compilation cache; one is idle while the other is timed. A step is the
difference of a long and a short command, divided by the difference of their steps, so starting, loading and compiling
cancel out. Both clocks are shown: on a busy machine trust the processor time. Medians of all rounds.

Options are spelled as the oldest revision spells them: later ones accept these names as aliases.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.compare_trees import ROOT, checked_out, write_inputs

ANSWER = """
import contextlib, io, json, os, shutil, sys, time
from ipadapter_jax.cli import main
for line in sys.stdin:
    shutil.rmtree("out", ignore_errors=True)
    wall, processor = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(json.loads(line))
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    print(json.dumps([code, seconds]), flush=True)
"""
CLOCKS = ("wall", "processor")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times the guided step and the training step of two revisions; AFTER is the working tree by default."""

    before: tyro.conf.Positional[str]
    after: tyro.conf.Positional[str | None] = None
    model: Annotated[str, tyro.conf.arg(help="mini, or a folder of ipadapter_jax.testing.random_weights")] = "mini"
    size: Annotated[int, tyro.conf.arg(help="height and width of an image in pixels")] = 64
    steps: Annotated[tuple[int, int], tyro.conf.arg(help="of the short and the long command")] = (10, 60)
    train_steps: tuple[int, int] = (4, 24)
    rounds: int = 5

    def commands(self, inputs: Path) -> Mapping[str, tuple[list[str], tuple[int, int]]]:
        """Words of the command without the number of steps, and both numbers."""
        mini = self.model == "mini"
        adapter = "mini" if mini else f"{self.model}/ip-adapter.safetensors"
        encoder = "mini/image_encoder" if mini else f"{self.model}/image_encoder"
        image, size = str(inputs / "images" / "img_a.png"), str(self.size)
        generate = ["generate", "--prompt", "a red ball", "--image", image, "--base", self.model, "--adapter", adapter]
        generate += [] if mini else ["--image-encoder", encoder]
        generate += ["--height", size, "--width", size, "--out", "out/image.png", "--steps"]
        train = ["train", "debug", "--model.base", self.model, "--model.image-encoder", encoder, "--out", "out/run"]
        train += ["--data.path", str(inputs / "images"), "--data.resolution", size, "--data.batch-size", "2"]
        train += ["--log.validate-every", "0", "--checkpoint.every", "1000", "--steps"]
        return {"guided step": (generate, self.steps), "training step": (train, self.train_steps)}


class Revision:
    """A process with the package of one tree, which runs commands and says how long they took."""

    def __init__(self, tree: Path, work: Path):
        cache = work / "cache"
        cache.mkdir(parents=True, mode=0o700)
        settings = {"PYTHONPATH": str(tree), "JAX_COMPILATION_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
        self.tree = tree
        self._process = subprocess.Popen(
            [sys.executable, "-c", ANSWER],
            cwd=work,
            env=os.environ | settings | {"JAX_PLATFORMS": "cpu"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def seconds(self, words: list[str]) -> dict[str, float]:
        """By clock."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        code, seconds = json.loads(answer) if answer else (self._process.wait(), {})
        if code:
            raise SystemExit(f"{self.tree}: exit code {code} of ipadapter-jax {' '.join(words)}")
        return seconds

    def step(self, command: list[str], steps: tuple[int, int]) -> dict[str, float]:
        """Seconds of one step, by clock."""
        short, long = (self.seconds([*command, str(number)]) for number in steps)
        return {clock: (long[clock] - short[clock]) / (steps[1] - steps[0]) for clock in CLOCKS}

    def close(self) -> None:
        self._process.communicate()


def main(settings: Settings) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-speed-")))
        write_inputs(folder / "inputs")
        trees = [stack.enter_context(checked_out(settings.before))]
        trees.append(ROOT if settings.after is None else stack.enter_context(checked_out(settings.after)))
        revisions = [Revision(tree, folder / str(number)) for number, tree in enumerate(trees)]
        print("| | clock | before | after | after / before |\n|---|---|---:|---:|---:|")
        for name, (command, steps) in settings.commands(folder / "inputs").items():
            for revision in revisions:
                revision.step(command, steps)  # compiles
            rounds = [[revision.step(command, steps) for revision in revisions] for _ in range(settings.rounds)]
            for clock in CLOCKS:
                before, after = (statistics.median(times[side][clock] for times in rounds) for side in (0, 1))
                shown = f"{before * 1e3:.1f} ms | {after * 1e3:.1f} ms | {after / before:.3f}"
                print(f"| {name} | {clock} | {shown} |", flush=True)
        for revision in revisions:
            revision.close()


if __name__ == "__main__":
    main(tyro.cli(Settings))
