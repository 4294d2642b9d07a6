"""The paper's experiments on mini, the model inside the package, and docs/results.md with what came out.

    python scripts/reproduce_mini.py --out runs/lab

Trains what is compared, paints every row of pictures, measures and writes the report. Everything lies in OUT as soon as
it is made, so the same command goes on where one was stopped. Needs the extra scenes.
"""

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from lab_claims import Measured
from lab_measures import Measures, Values
from lab_report import SHOWN, Report, Setting
from lab_rows import BY_SCALE, CHANCE, MAIN, MINI, SWEEPS, Painter, Row
from lab_scenes import inked, prompt
from lab_trainings import SHIPPED, Workshop
from safetensors import safe_open

from ipadapter_jax import InputError
from ipadapter_jax.embedded import FOLDER
from ipadapter_jax.files import check_writable
from ipadapter_jax.scenes.render import render


def main(
    out: Annotated[Path, tyro.conf.arg(help="folder of everything that is made on the way")],
    report: Annotated[Path, tyro.conf.arg(help="the file to write; its pictures go beside it")] = Path(
        "docs/results.md"
    ),
    base: Annotated[Path, tyro.conf.arg(help="base model with image_encoder and adapters, laid out as mini")] = FOLDER,
    prompts: Annotated[int, tyro.conf.arg(help="held-out image prompts of the main table")] = 500,
    sweep_prompts: Annotated[int, tyro.conf.arg(help="of the other tables")] = 250,
    sampling_steps: int = 25,
    steps: Annotated[int, tyro.conf.arg(help="training steps of each adapter that is compared")] = 1500,
    scenes: Annotated[int, tyro.conf.arg(help="training examples")] = 30_000,
    batch_size: int = 64,
) -> int:
    """Does what is left of the work and writes the report. Returns the exit code."""
    try:
        check_writable(report)
        if not 1 <= sweep_prompts <= prompts:
            raise InputError(f"--sweep-prompts {sweep_prompts}: give 1 to --prompts, which is {prompts}")
        workshop = Workshop(out, base, scenes, steps, batch_size)
        painter = Painter(workshop, sampling_steps)
        _write(report, workshop, painter, prompts, sweep_prompts)
    except InputError as error:
        print(f"reproduce_mini: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


def _write(report: Path, workshop: Workshop, painter: Painter, prompts: int, sweep_prompts: int) -> None:
    given = [prompt(index) for index in range(prompts)]
    own = painter.pipeline(MINI)
    measures = Measures(own, given)
    rows: dict[Row, Values] = {}
    pictures: dict[Row, np.ndarray] = {}
    for row in dict.fromkeys((*MAIN, *SWEEPS)):
        painted = painter.paint(row, prompts if row in MAIN else sweep_prompts)
        rows[row], pictures[row] = measures.of(painted), painted[:SHOWN]
        if row == CHANCE:
            unprompted = painted[:sweep_prompts]
        if row == BY_SCALE[0]:
            unlike = int((painted != unprompted).sum())
    inks = np.stack([render(inked(one.scene)) for one in given])
    judged = {
        "renders": measures.agreement(measures.references[:, None]),
        "after mini's VAE": measures.agreement(measures.reconstructions()[:, None]),
        "renders in ink": measures.agreement(inks[:, None]),
    }
    sizes = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (own.adapters[0].params, own.params["unet"]))
    setting = Setting(
        command=" ".join(["python scripts/reproduce_mini.py", *sys.argv[1:]]),
        base_digest=workshop.base_digest,
        prompts=prompts,
        sweep_prompts=sweep_prompts,
        sampling_steps=painter.steps,
        compared_steps=workshop.steps,
        shipped_steps={name: _steps(workshop, name) for name in SHIPPED},
        batch_size=workshop.batch_size,
        scenes=workshop.scenes,
        versions=f"ipadapter-jax {importlib.metadata.version('ipadapter-jax')}, jax {jax.__version__}",
    )
    Report(report, setting, Measured(rows, unlike, *sizes), pictures).write(judged)


def _steps(workshop: Workshop, adapter: str) -> int:
    """Training steps behind an adapter, as its file says."""
    with safe_open(workshop.adapter(adapter), "numpy") as file:
        return int(file.metadata()["step"])


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)  # small networks are faster with one device per core
    sys.exit(tyro.cli(main))
