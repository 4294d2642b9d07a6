"""Damaged checkpoints: every file of the newest one, bits flipped, cut off, zeroed, deleted."""

import contextlib
import dataclasses
import logging
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from ipadapter_jax.train.checkpoint import Checkpoints
from ipadapter_jax.train.checksums import tree_checksums
from ipadapter_jax.train.run_dir import CHECKPOINTS
from tests.fault_injection.runs import contents, hold, logged, outcome, prepare, run_here


def flip(content: bytes, rng: random.Random) -> bytes:
    damaged, at = bytearray(content), rng.randrange(8 * len(content))
    damaged[at // 8] ^= 1 << at % 8
    return bytes(damaged)


DAMAGES = {
    "flip": flip,
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
    "zeros": lambda content, rng: bytes(len(content)),
    "delete": lambda content, rng: None,
}


@dataclasses.dataclass(frozen=True)
class Damage:
    """A bit flipped, an end cut off, zeros, or nothing, in each file of the newest checkpoint.

    What is read is to the bit what was saved: of that step where the damage did no harm, else of the step before, and
    then the damaged one is named. A run goes on from there to the bit."""

    trials: int = 200
    seed: int = 0

    def __call__(self, work: Path) -> str:
        config = prepare(work, steps=4, save_every=2)
        run_here(config)
        folder, rng = Path(config.out) / CHECKPOINTS, random.Random(self.seed)
        template, good = _template(folder), {step: tree_checksums(_leaves(folder, step)) for step in (2, 4)}
        files = [path for path in sorted((folder / "4").rglob("*")) if path.is_file() and path.stat().st_size]
        outcomes, trial = Counter(), work / "trial"
        for number in range(self.trials):
            file = files[number % len(files)].relative_to(folder)
            kind = [*DAMAGES][number // len(files) % len(DAMAGES)]
            shutil.copytree(folder, trial)
            _damage(trial / file, kind, rng)
            with _warnings() as said:
                step, found = _restored(trial, template)
            hold(found == good[step], f"silent difference: {kind} of {file} gave other arrays for step {step}")
            named = any("step 4 is damaged and skipped" in line for line in said)
            hold(named == (step == 2), f"{kind} of {file}: step {step} was taken, and the log says {said}")
            outcomes[step] += 1
            shutil.rmtree(trial)
        before, (loss, final) = contents(folder), (logged(Path(config.out)), outcome(Path(config.out)))
        _damage(next((folder / "4").glob("state/**/d/*")), "flip", rng)
        hold(contents(folder) != before, "nothing was damaged")
        run_here(config)
        hold((logged(Path(config.out)), outcome(Path(config.out))) == (loss, final), "the run went on otherwise")
        return (
            f"{self.trials} damages of {len(files)} files: {outcomes[2]} noticed and the step before taken, "
            f"{outcomes[4]} harmless, 0 silent differences; a run went on to the bit"
        )


def _damage(path: Path, kind: str, rng: random.Random) -> None:
    content = DAMAGES[kind](path.read_bytes(), rng)
    path.unlink() if content is None else path.write_bytes(content)


def _template(folder: Path) -> dict[str, Any]:
    leaves = _leaves(folder, 4)
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in leaves.items()}


def _leaves(folder: Path, step: int) -> dict[str, Any]:
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        found = checkpoints.leaves(step)
    assert found is not None
    return found[1]


def _restored(folder: Path, template: dict[str, Any]) -> tuple[int, dict[str, str]]:
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        found = checkpoints.restore(template)
    hold(found is not None, "nothing was found")
    assert found is not None
    return found[0], tree_checksums(found[1])


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the package warns of inside the block, and nobody else sees."""
    lines: list[str] = []
    log, handler = logging.getLogger("ipadapter_jax"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    before, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.propagate = before
