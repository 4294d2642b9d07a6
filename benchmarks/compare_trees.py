"""Shows that a refactoring changes nothing: runs the same commands in two revisions and compares what they write.

    python -m benchmarks.compare_trees main                    # a revision with the working tree
    python -m benchmarks.compare_trees v0.1 main --keep out/trees

Every revision is checked out into a temporary worktree and runs all jobs in one process of its own, with the inputs of
the tree that this script lies in and with an empty compilation cache. Images are compared by pixel, weights, adapters
and caches by byte, losses by their shortest exact decimals. Prints a table and exits with 1 if anything differs. Run it
on one machine and one environment: another processor or release of jax may round differently.

Options are spelled as the oldest revision spells them: later ones accept these names as aliases.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.output_differences import compare, table

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "tests" / "data" / "oracles"  # tiny models and images

MODEL, ADAPTERS = "inputs/models/sd15_torch", "inputs/models/ip_adapter/models"
ENCODER, REFERENCE = f"{ADAPTERS}/image_encoder", "inputs/images/img_a.png"
MASKS = ["--masks", "inputs/assets/ipmask_1.png", "inputs/assets/ipmask_2.png"]
GENERATE = ["generate", "--seed", "3", "--steps", "4", "--prompt", "a red ball", "--out", "OUT/image.png"]
MINI = [*GENERATE, "--image", REFERENCE]
INIT = ["--init-image", "inputs/assets/init.png"]
EASE_OUT = ["--layers", "ease out", "--scale-steps", "1", "0.2"]
ENCODE = ["encode", "--data", "inputs/images", "--out", "OUT/cache", "--resolution", "64", "--dtype", "float32"]
TRAIN = ["train", "debug", "--out", "OUT/run", "--steps", "4", "--log.every", "1", "--checkpoint.every", "2"]
TRAIN += ["--data.batch-size", "4", "--checkpoint.export-dtype", "float32", "--optim.learning-rate", "1e-3"]
SAMPLERS = ("ddim", "ddpm", "pndm", "dpmsolver++", "euler", "euler_a", "unipc", "lcm")

# In each, OUT stands for the job's own folder; a job may read what an earlier one wrote.
JOBS: dict[str, list[str]] = {
    "text": GENERATE,
    "image-prompt": [*MINI, "--scale", "0.7", "--save-embeds", "OUT/embeds.safetensors"],
    "from-embeddings": [*GENERATE, "--embeds", "image-prompt/embeds.safetensors"],
    "two-references": [*MINI, "inputs/images/img_b.png", "--adapter", "mini-plus", *MASKS, *EASE_OUT],
    "preset": [*MINI, "--base", MODEL, "--adapter", f"{ADAPTERS}/ip-adapter_tiny.safetensors", "--layers", "style"],
    "image-to-image": [*MINI, *INIT, "--strength", "0.5"],
    "inpainting": [*MINI, *INIT, "--mask-image", "inputs/assets/mask.png", "--exact-outside-mask"],
    "attention-maps": [*MINI, "--attention-maps", "OUT/maps.png"],
    "stochastic": [*MINI, "--scheduler", "ddim", "--eta", "0.5", "--guidance-rescale", "0.7"],
    "several-images": [*MINI, "--num-images", "2", "--uncond", "noise", "--fit", "tile"],
    **{f"sampler-{name}": [*GENERATE, "--scheduler", name] for name in SAMPLERS},
    "karras": [*GENERATE, "--scheduler", "dpmsolver++", "--karras", "--timestep-spacing", "trailing"],
    "batch": ["batch", "inputs/images", "--out", "OUT/images", "--steps", "4", "--batch-size", "2"],
    "convert-folder": ["convert", "mini", "OUT/folder"],
    "convert-flax": ["convert", "mini", "OUT/flax", "--flax"],
    "convert-float16": ["convert", "mini", "OUT/folder", "--dtype", "float16"],
    "convert-single-file": ["convert", "mini", "OUT/model.safetensors"],
    "convert-bfloat16": ["convert", "mini", "OUT/model.safetensors", "--dtype", "bfloat16"],
    "convert-from-single-file": ["convert", "convert-single-file/model.safetensors", "OUT/folder", "--config", "mini"],
    "convert-from-flax": ["convert", "convert-flax/flax", "OUT/folder"],
    "convert-encoder": ["convert", ENCODER, "OUT/encoder"],
    "convert-adapter": ["convert", f"{ADAPTERS}/ip-adapter_tiny.bin", "OUT/adapter.safetensors"],
    "convert-plus": ["convert", f"{ADAPTERS}/ip-adapter-plus_tiny.safetensors", "OUT/adapter.bin"],
    "convert-full": [
        *("convert", f"{ADAPTERS}/ip-adapter-full-face_tiny.bin", "OUT/adapter.safetensors", "--dtype", "bfloat16")
    ],
    "encode-pooled": [*ENCODE, "--base", MODEL, "--image-encoder", ENCODER],
    "encode-penultimate": [
        *(*ENCODE, "--base", "mini", "--image-encoder", "mini/image_encoder", "--features", "penultimate")
    ],
    "train-images": [
        *(*TRAIN, "--model.base", MODEL, "--model.image-encoder", ENCODER, "--data.path", "inputs/images"),
        *("--log.validate-every", "0"),
    ],
    "train-cached": [
        *(*TRAIN, "--model.base", "mini", "--model.image-encoder", "mini/image_encoder", "--model.adapter", "plus"),
        *("--data.path", "encode-penultimate/cache", "--optim.ema", "0.9", "--optim.accumulate", "2"),
        *("--log.validate-every", "4", "--log.sample-steps", "2"),
    ],
}

RUN_JOBS = """
import json, pathlib, sys, time, traceback
from ipadapter_jax.cli import main
for name, words in json.load(sys.stdin).items():
    pathlib.Path(name).mkdir()
    began = time.monotonic()
    try:
        code = main(words)
    except Exception:
        code = traceback.print_exc()
    pathlib.Path(name, "exit_code").write_text(str(code))
    print(f"== {name}: exit code {code}, {time.monotonic() - began:.1f} s", flush=True)
"""


def main(
    before: tyro.conf.Positional[str],
    after: tyro.conf.Positional[str | None] = None,
    keep: Annotated[Path | None, tyro.conf.arg(help="folder for the outputs of revisions, which are reused")] = None,
) -> None:
    """Compares the outputs of two revisions; AFTER is the working tree by default."""
    with tempfile.TemporaryDirectory(prefix="compare-trees-") as temporary:
        folder = keep or Path(temporary)
        old = outputs_of(before, folder)
        new = run_jobs(ROOT, Path(temporary, "working-tree")) if after is None else outputs_of(after, folder)
        rows = compare(old, new)
    print(table(rows))
    sys.exit(any(row.difference for row in rows))


def outputs_of(revision: str, folder: Path) -> Path:
    """The folder of what all jobs write in a revision, made unless `folder` has it."""
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    depends = json.dumps([JOBS, importlib.metadata.version("jaxlib")])
    outputs = folder / f"{commit}-{hashlib.sha256(depends.encode()).hexdigest()[:8]}"
    if outputs.exists():
        return outputs
    with checked_out(commit) as tree:
        return run_jobs(tree, outputs)


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary worktree of this commit."""
    with tempfile.TemporaryDirectory(prefix="compare-trees-") as temporary:
        tree = Path(temporary, "tree")
        _git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def run_jobs(tree: Path, outputs: Path) -> Path:
    """Runs all jobs with the package of a tree, and moves what they wrote to `outputs` when all of them have ended.

    In one process: most of a job's time would be imports, and samplers share programs.
    """
    with tempfile.TemporaryDirectory(prefix="compare-trees-") as temporary:
        work, cache = Path(temporary, "work"), Path(temporary, "cache")
        cache.mkdir(mode=0o700)
        write_inputs(work / "inputs")
        jobs = {name: [word.replace("OUT/", f"{name}/") for word in words] for name, words in JOBS.items()}
        settings = {"PYTHONPATH": str(tree), "JAX_COMPILATION_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", RUN_JOBS]
        print(f"== {tree}: {len(jobs)} jobs", file=sys.stderr, flush=True)
        done = subprocess.run(
            command, cwd=work, env=os.environ | settings, input=json.dumps(jobs), text=True, stdout=sys.stderr
        )
        if done.returncode:
            raise SystemExit(f"{tree}: the jobs ended with exit code {done.returncode}")
        shutil.rmtree(work / "inputs")
        outputs.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(work, outputs)
    return outputs


def write_inputs(folder: Path) -> None:
    """Recorded models and images, and a folder of images with captions."""
    for name in ("models", "assets"):
        shutil.copytree(RECORDED / name, folder / name)
    (folder / "images").mkdir()
    for name in ("img_a", "img_b", "img_c", "img_gray", "img_rgba"):  # always the same, so that kept outputs compare
        image = RECORDED / "assets" / f"{name}.png"
        shutil.copy(image, folder / "images")
        (folder / "images" / f"{image.stem}.txt").write_text(f"an image, {image.stem}")


if __name__ == "__main__":
    tyro.cli(main)
