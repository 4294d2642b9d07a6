"""The training runs of the experiments: adapters that differ in one setting each, and a UNet for another drawing style.

All adapters are trained on the same samples in the same order with the same noise, batch size, optimizer and number of
steps, as in the recipe configs/mini.py. `ipadapter-jax train` trains those with decoupled cross-attention.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

from experiments.mini.joint_training import LEARNS, Joined, train
from experiments.mini.run_settings import check_same
from experiments.mini.test_scenes import inked_example, plain_example, write_examples
from ipadapter_jax import cli
from ipadapter_jax.cli.train import parse
from ipadapter_jax.storage.atomic_files import sha256, write_atomically
from ipadapter_jax.train.config import identity
from ipadapter_jax.train.export import ADAPTER

ENCODER = "image_encoder"  # in the base model's folder
SHIPPED = {"mini": "ip-adapter_mini.safetensors", "mini-plus": "ip-adapter-plus_mini.safetensors"}


@dataclasses.dataclass(frozen=True)
class Training:
    recipe: str
    options: str = ""
    joined: Joined | None = None
    data: str = "plain"
    features: str = "pooled"


TRAININGS = {
    "simple": Training("mini", joined="simple"),
    "decoupled": Training("mini"),
    "plus": Training("mini_plus", features="penultimate"),
    "full": Training("mini", joined="full"),
    # A shorter moving average than the recipe's, in which a fifth of the base UNet would remain after so few steps.
    "inked": Training("mini_unet", "--optim.ema 0.99", data="inked"),
    "no image dropped": Training("mini", "--data.drop-image 0 --data.drop-both 0"),
    "little text dropped": Training("mini", "--data.drop-text 0.05"),
}
_DRAWN = {"plain": plain_example, "inked": inked_example}


@dataclasses.dataclass(frozen=True)
class Workshop:
    """The folder of all training runs and their data, and the sizes that they share."""

    out: Path
    base: Path  # a folder in the layout of the bundled mini
    scenes: int
    steps: int
    batch_size: int
    _ready: set[Path] = dataclasses.field(default_factory=set)  # feature caches that are known to be complete

    @functools.cached_property
    def base_digest(self) -> str:
        """The digest of all weights of the base model except its adapters."""
        files = sorted(self.base.glob("*/*.safetensors"))
        return hashlib.sha256(" ".join(map(sha256, files)).encode()).hexdigest()

    def trained(self, name: str) -> Path:
        """The folder of a training run. Trains first if it is not finished, and resumes if it was stopped.

        Raises InputError if it was started with other settings or another base model.
        """
        training, folder = TRAININGS[name], self.out / "trained" / name.replace(" ", "-")
        words = self._words(training)
        learnt = {"steps": self.steps, "scenes": self.scenes, "base": self.base_digest, "joined": training.joined}
        check_same(folder / "settings.json", learnt | identity(parse(words)))
        mark = folder / "finished"
        if mark.exists():
            return folder
        data = self._encoded(training.data, training.features)
        words += ["--data.path", str(data), *self._places("--model."), "--out", str(folder)]
        if training.joined is None:
            _run(["train", *words])
        else:
            print("training", name, *words, flush=True)
            _check(train(parse(words), training.joined))
        write_atomically(mark, b"")
        return folder

    def adapter(self, name: str) -> Path:
        """The adapter file of a training run, or of the base model."""
        return self.base / SHIPPED[name] if name in SHIPPED else self.trained(name) / ADAPTER

    def _words(self, training: Training) -> list[str]:
        learns = ["--model.train", *LEARNS[training.joined]] if training.joined else []
        counts = ["--steps", str(self.steps), "--data.batch-size", str(self.batch_size)]
        return [training.recipe, *counts, "--log.no-tensorboard", *training.options.split(), *learns]

    def _encoded(self, data: str, features: str) -> Path:
        """The feature cache of a data set, by `ipadapter-jax encode`, which resumes if it was stopped."""
        folder = self.out / "data"
        images, out = folder / f"{data}-{self.scenes}.parquet", folder / f"{data}-{self.scenes}-{features}"
        if out not in self._ready:
            write_examples(images, _DRAWN[data], self.scenes)
            words = ["encode", "--data", str(images), "--out", str(out), "--features", features]
            _run([*words, *self._places("--"), "--resolution", "64", "--dtype", "float32"])
            self._ready.add(out)
        return out

    def _places(self, prefix: str) -> list[str]:
        return [f"{prefix}base", str(self.base), f"{prefix}image-encoder", str(self.base / ENCODER)]


def drops(name: str) -> tuple[float, float, float]:
    """The fractions of a training run's samples without image, without text, and without both."""
    data = parse([TRAININGS[name].recipe, *TRAININGS[name].options.split()]).data
    return data.drop_image, data.drop_text, data.drop_both


def _run(words: Sequence[str]) -> None:
    """Runs `ipadapter-jax` with these arguments."""
    print("ipadapter-jax", *words, flush=True)
    _check(cli.main(words))


def _check(code: int) -> None:
    if code:
        raise SystemExit(code)
