"""Runs the paper's experiments on mini, the bundled model, and writes docs/results.md with the results.

    python -m experiments.mini.reproduce --out runs/lab

Trains the models that are compared, generates every row of images, measures and writes the report. Each result is
saved in OUT, so rerun the same command to resume. Needs the extra scenes.
"""

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from safetensors import safe_open

from experiments.mini.claims import Measured
from experiments.mini.cpu_devices import use_cores
from experiments.mini.metrics import Eyes, Measures, Values
from experiments.mini.network_report import distances, probes, psnr
from experiments.mini.report import SHOWN, Networks, Report, Setting
from experiments.mini.rows import BY_SCALE, CHANCE, MINI, PHOTOGRAPHS, ROWS, Painter, Row
from experiments.mini.scenes.render import render
from experiments.mini.test_scenes import inked, photograph, prompt
from experiments.mini.trainings import SHIPPED, TRAININGS, Workshop
from ipadapter_jax import InputError
from ipadapter_jax.cli.train import parse
from ipadapter_jax.storage.atomic_files import check_writable
from ipadapter_jax.weights.bundled import FOLDER


def main(
    out: Annotated[Path, tyro.conf.arg(help="folder of everything that is made on the way")],
    report: Annotated[Path, tyro.conf.arg(help="the file to write; its images go beside it")] = Path("docs/results.md"),
    base: Annotated[Path, tyro.conf.arg(help="base model with image_encoder and adapters, laid out as mini")] = FOLDER,
    prompts: Annotated[int, tyro.conf.arg(help="held-out image prompts of every row")] = 500,
    sampling_steps: int = 15,
    steps: Annotated[int, tyro.conf.arg(help="training steps of all that is compared")] = 1200,
    scenes: Annotated[int, tyro.conf.arg(help="training examples")] = 30_000,
    batch_size: int = 64,
) -> int:
    """Does the remaining work and writes the report. Returns the exit code."""
    try:
        if report.suffix != ".md":
            raise InputError(f"--report {report}: give a name that ends in .md")
        if prompts < 2:
            raise InputError(f"--prompts {prompts}: give 2 or more")
        check_writable(report)
        workshop = Workshop(out, base, scenes, steps, batch_size)
        _write(report, workshop, Painter(workshop, sampling_steps), prompts)
    except InputError as error:
        print(f"reproduce_mini: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


def _write(report: Path, workshop: Workshop, painter: Painter, prompts: int) -> None:
    own = painter.pipeline(MINI)
    eyes, given = Eyes(own), [prompt(index) for index in range(prompts)]
    measures = Measures(eyes, given)
    painted = {row: painter.paint(row, prompts) for row in (*ROWS, PHOTOGRAPHS)}
    rows = {row: measures.of(painted[row]) for row in ROWS}
    sizes = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (own.adapters[0].params, own.params["unet"]))
    unlike = int((painted[BY_SCALE[0]] != painted[CHANCE]).sum())
    measured = Measured(rows, _judged(eyes, measures, prompts), unlike, *sizes)
    shown = {row: images[:SHOWN] for row, images in painted.items()}
    Report(report, _setting(workshop, painter, prompts), measured, shown).write(_networks(eyes, painted, prompts))


def _judged(eyes: Eyes, measures: Measures, prompts: int) -> dict[str, Values]:
    """By the kind of image, the measures of images that show the prompts exactly: the accuracy of the classifier."""
    scenes = [prompt(index).scene for index in range(prompts)]
    plain, inks = (np.stack([render(style(scene)) for scene in scenes]) for style in (lambda scene: scene, inked))
    made = {"renders": plain, "after mini's VAE": eyes.reconstructions(plain), "renders in ink": inks}
    return {name: measures.agreement(pixels[:, None]) for name, pixels in made.items()}


def _networks(eyes: Eyes, painted: dict[Row, np.ndarray], prompts: int) -> Networks:
    scenes = [prompt(index) for index in range(prompts)]
    crops = np.stack([photograph(index).pixels for index in range(prompts)])
    shown = {"the image prompts": np.stack([one.pixels for one in scenes]), "crops of photographs": crops}
    compared = {"their own prompt": crops, "another's": np.roll(crops, 1, axis=0)}
    return Networks(
        psnr={name: psnr(eyes, pixels) for name, pixels in shown.items()},
        probes=probes(eyes, [one.scene for one in scenes]),
        photographs={name: distances(eyes, pixels, painted[PHOTOGRAPHS]) for name, pixels in compared.items()},
    )


def _setting(workshop: Workshop, painter: Painter, prompts: int) -> Setting:
    recipe = parse([TRAININGS["decoupled"].recipe])
    return Setting(
        base_digest=workshop.base_digest,
        prompts=prompts,
        sampling_steps=painter.steps,
        compared_steps=workshop.steps,
        shipped_steps={name: _steps(workshop, name) for name in SHIPPED},
        batch_size=workshop.batch_size,
        scenes=workshop.scenes,
        seed=recipe.seed,
        versions=f"ipadapter-jax {importlib.metadata.version('ipadapter-jax')}, jax {jax.__version__}",
    )


def _steps(workshop: Workshop, adapter: str) -> int:
    """The training steps of an adapter, from the metadata of its file."""
    with safe_open(workshop.adapter(adapter), "numpy") as file:
        return int(file.metadata()["step"])


if __name__ == "__main__":
    use_cores()
    sys.exit(tyro.cli(main))
