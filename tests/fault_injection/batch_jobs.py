"""kill -9 while data are encoded, images made from a list, and an adapter evaluated."""

import dataclasses
import random
import subprocess
import sys
import time
from pathlib import Path

from experiments.mini.evaluate import write_clip, write_coco
from tests.fault_injection.runs import SIDE, contents, environment, hold, prepare


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line without its --out, and the files that are the truth of its work."""

    name: str
    places: list[Path]
    options: dict[str, object]
    made: tuple[str, ...]  # patterns

    def start(self, out: Path) -> subprocess.Popen:
        options = [str(word) for name, value in self.options.items() for word in (f"--{name}", value)]
        words = [sys.executable, "-m", "ipadapter_jax.cli", self.name, *map(str, self.places), *options]
        with open(out.with_name(f"{out.name}.log"), "ab") as log:
            return subprocess.Popen([*words, "--out", str(out)], env=environment(devices=1), stdout=log, stderr=log)

    def finish(self, out: Path) -> None:
        code = self.start(out).wait(600)
        hold(code == 0, f"{self.name} ended with {code}: {out.with_name(f'{out.name}.log').read_text()[-2000:]}")

    def whole(self, out: Path) -> dict[str, tuple[int, int]]:
        """What is made, each file as it was written: another one of the same name is another."""
        found = [path for pattern in self.made for path in out.glob(pattern) if not path.name.startswith(".")]
        facts = {str(path.relative_to(out)): path.stat() for path in found}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in facts.items()}


@dataclasses.dataclass(frozen=True)
class Jobs:
    """kill -9 at random moments of `encode`, `batch` and `evaluate`: the same files and numbers as without, nothing
    that was whole made again, nothing lost."""

    times: int = 5
    """Kills of each."""
    commands: tuple[str, ...] = ("encode", "batch", "evaluate")
    records: int = 64
    seed: int = 0

    def __call__(self, work: Path) -> str:
        rng, told = random.Random(self.seed), []
        prepare(work, 1, 1, self.records)
        for command in (command for command in self._commands(work) if command.name in self.commands):
            out, disturbed = work / command.name, work / f"{command.name}-disturbed"
            command.finish(out)
            kills = sum(self._kill(command, disturbed, rng) for _ in range(self.times))
            hold(kills > 0, f"{command.name} was over before it could be killed: more --records than {self.records}")
            before = command.whole(disturbed)
            command.finish(disturbed)
            after = command.whole(disturbed)
            hold(before.items() <= after.items(), f"{command.name}: what was whole was made again")
            expected, found = _contents(out), _contents(disturbed)
            wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            hold(not wrong, f"{command.name}: {wrong[:5]} differ from those of the undisturbed one")
            told.append(f"{command.name} {kills} times at {len(after)} files")
        return f"killed {', '.join(told)}: equal to the byte, nothing made twice, nothing lost"

    def _kill(self, command: Command, out: Path, rng: random.Random) -> bool:
        """False when it was over before."""
        before = command.whole(out)
        process = command.start(out)
        while process.poll() is None and len(command.whole(out)) <= len(before) and rng.random() < 0.995:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        alive = process.poll() is None
        process.kill()
        process.wait()
        hold(before.items() <= command.whole(out).items(), f"{command.name}: what was whole was made again")
        return alive

    def _commands(self, work: Path) -> list[Command]:
        model, images, annotations = work / "model", work / "images", write_coco(work / "coco", self.records // 4)
        write_clip(work / "clip")
        models = work / "model" / "ip_adapter" / "models"
        encoding = {"base": model, "image-encoder": models / "image_encoder", "data": images, "resolution": SIDE}
        encoding |= {"shard-records": 8, "batch-size": 4}
        sampling = {"base": model, "adapter": models / "ip-adapter_sd15.safetensors", "height": SIDE, "width": SIDE}
        sampling |= {"steps": 2, "batch-size": 4}
        scoring = {"image-root": work / "coco" / "val2017", "clip": work / "clip", "num-images": 1, "steps": 2}
        return [
            Command("encode", [], encoding, ("shard-*",)),
            Command("batch", [images], sampling, ("*.png",)),
            Command("evaluate", [annotations], scoring, ("images/*.png", "scores/*.safetensors")),
        ]


def _contents(out: Path) -> dict[str, str | list[str]]:
    """Every file below the folder; the lines of a list in order, as images are made in another one after a kill; no
    embeddings, which name the time stamps of their images, and whose numbers are in the tables."""
    lists = {str(path.relative_to(out)): sorted(path.read_text().splitlines()) for path in out.rglob("job*.jsonl")}
    files = {name: digest for name, digest in contents(out).items() if not name.startswith("scores/")}
    return files | lists
