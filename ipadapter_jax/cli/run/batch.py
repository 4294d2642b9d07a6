"""Runs `ipadapter-jax batch`: thousands of images from a folder or a list."""

import dataclasses
import functools
import sys
import warnings
from collections.abc import Sequence

from ipadapter_jax.batch.plan import plan_tasks
from ipadapter_jax.batch.rows import BatchRow, read_rows
from ipadapter_jax.cli.batch import Batch
from ipadapter_jax.cli.options import IMAGE_PROMPT_OPTIONS, refuse
from ipadapter_jax.cli.run.image_batches import make_images, settings
from ipadapter_jax.cli.run.sampling import load_for_job
from ipadapter_jax.data.unused_files import summarize, write_report
from ipadapter_jax.errors import InputError
from ipadapter_jax.pipelines.feature_encoder import PreparedImages
from ipadapter_jax.pipelines.stable_diffusion import StableDiffusion
from ipadapter_jax.runtime.memory_limits import check_job_memory
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.weights import bundled


def batch(args: Batch) -> int:
    """Loads, makes what is missing. Returns 75 when it was stopped by SIGTERM, the rest being still to do."""
    rows, invalid, left_out = read_rows(args.source)
    has_references = any(row.images for row in rows)
    check_effects(args, rows)
    check_job_memory(len(rows), args.num_images)
    if has_references and args.adapter is None:
        if args.model != bundled.NAME:
            raise InputError(f"{args.source} has image prompts: name the IP-Adapter that reads them with --adapter")
        args = dataclasses.replace(args, adapter=bundled.NAME)
    job = load_for_job(args, images=args.batch_size, with_encoder=has_references)
    print(f"{args.source}: {summarize(len(rows), left_out)}", file=sys.stderr)
    tasks = plan_tasks(rows, num_images=args.num_images, seed=args.seed, scale=args.scale, shard=args.shard)
    prepare = functools.partial(_load, job.pipe, args.reference_resize)
    progress = make_images(job, args, tasks, args.out, settings(args, job.pipe), prepare, invalid)
    if args.process == 0:
        write_report(LocalStore(args.out), left_out)
    if progress.invalid:
        name = "bad_rows.jsonl" if args.process == 0 else f"bad_rows-{args.process}.jsonl"
        print(f"{len(progress.invalid)} rows could not be used, see {args.out / name}", file=sys.stderr)
    print(args.out)
    return progress.code


def check_effects(args: Batch, rows: Sequence[BatchRow]) -> None:
    """Raises InputError for options, and warns of columns, that have no effect on any of these rows."""
    if not any(row.images for row in rows):
        refuse(args, IMAGE_PROMPT_OPTIONS, f"on {args.source}, of which no row has an image", "name images there")
    negative = next((row for row in rows if row.negative_prompt), None)
    if negative is not None and args.guidance_scale is not None and args.guidance_scale <= 1:
        raise InputError(
            f"{args.source}, line {negative.line}: negative_prompt has no effect with --guidance-scale "
            f"{args.guidance_scale:g}; give one above 1, or leave the column out"
        )
    unseen = [row.line for row in rows if row.scale is not None and not row.images]
    if unseen:
        warnings.warn(
            f"{args.source}: {len(unseen)} rows, line {unseen[0]} the first, have a scale, which has no effect "
            "without an image",
            stacklevel=2,
        )
    own = {
        "--seed": args.seed != 0 and all(row.seed is not None for row in rows),
        "--scale": args.scale != 1 and all(row.scale is not None for row in rows),
        "--negative-prompt": args.negative_prompt != "" and all(row.negative_prompt for row in rows),
    }
    for option, needless in own.items():
        if needless:
            warnings.warn(f"{option} has no effect: every row of {args.source} has its own", stacklevel=2)


def _load(pipe: StableDiffusion, fit: str, row: BatchRow) -> PreparedImages | None:
    """What the image encoder sees of a row's images."""
    return pipe.adapters[0].inputs.prepare([str(path) for path in row.images], fit) if row.images else None
