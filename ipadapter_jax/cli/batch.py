"""`ipadapter-jax batch`: thousands of pictures from a folder or a list."""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tqdm
import tyro
from PIL import Image

from ipadapter_jax import embedded
from ipadapter_jax.adapters import Prepared
from ipadapter_jax.cli.options import Sampling, digests, png, versions
from ipadapter_jax.errors import InputError
from ipadapter_jax.image_prompts import PerPrompt
from ipadapter_jax.jobs.plan import Work, plan
from ipadapter_jax.jobs.rows import Row, read_rows
from ipadapter_jax.jobs.run import Tally, run_job
from ipadapter_jax.pipeline import StableDiffusion


@dataclasses.dataclass(kw_only=True)
class Batch(Sampling):
    """Makes pictures for every row of a list, on all devices, into a folder.

    The same command goes on after any stop, kill -9 included, without making a picture twice or losing one. Rows that
    cannot be used are skipped and listed in bad_rows.jsonl. Every picture depends on its own row and the options alone.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """A folder of reference pictures (name.jpg, its prompt in name.txt), or a .csv or .jsonl with the columns prompt,
    image (several separated by ; or as a list), negative_prompt, seed, scale, name."""
    out: Path
    """The folder for the pictures, with job.json, job.jsonl (a line for each picture) and bad_rows.jsonl."""
    num_images: int = 1
    """Pictures of each row."""
    seed: int = 0
    """Of rows that have none: this + a number made of the row's name."""
    batch_size: int = 8
    """Pictures made at once, on all devices together."""
    process: int = 0
    """Which of several processes this is, on this machine or others that share the folder; each takes its rows."""
    processes: int = 1
    """How many there are."""


def batch(args: Batch) -> int:
    """Checks, loads, makes what is missing. Returns 75 when it was stopped by SIGTERM, the rest being still to do."""
    _check(args)
    rows, bad = read_rows(args.source)
    pictured = any(row.images for row in rows)
    if pictured and args.adapter is None:
        if args.base != embedded.NAME:
            raise InputError(f"{args.source} has image prompts: name the IP-Adapter that reads them with --adapter")
        args = dataclasses.replace(args, adapter=embedded.NAME)
    pipe = args.load(with_encoder=pictured)
    shard = (args.process, args.processes)
    works = plan(rows, num_images=args.num_images, seed=args.seed, scale=args.scale, shard=shard)
    settings = _settings(args, pipe)
    with tqdm.tqdm(total=len(works), desc="pictures", unit="picture", disable=None) as bar:

        def on_progress(tally: Tally) -> None:
            bar.n = tally.before + tally.made
            bar.refresh()

        tally = run_job(
            works,
            args.out,
            settings=settings,
            batch_size=args.batch_size,
            load=functools.partial(_load, pipe, args.fit),
            make=functools.partial(_make, pipe, args),
            encode=lambda work, picture: png(picture, _metadata(settings, work)),
            bad=bad,
            shard=shard,
            kind=lambda work, content: 0 if content is None else len(content.pixels),
            on_progress=on_progress,
        )
    if tally.bad:
        name = "bad_rows.jsonl" if args.process == 0 else f"bad_rows-{args.process}.jsonl"
        print(f"{len(tally.bad)} rows could not be used, see {args.out / name}", file=sys.stderr)
    if tally.stopped:
        print(f"stopped at {tally.before + tally.made} of {tally.total}; the same command goes on", file=sys.stderr)
    print(args.out)
    return tally.code


def _check(args: Batch) -> None:
    args.check()
    for name, value in (("num-images", args.num_images), ("batch-size", args.batch_size)):
        if value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed} must lie between 0 and 2^32 - 1")
    if not 0 <= args.process < args.processes:
        raise InputError(f"--process {args.process} of --processes {args.processes}: they count from 0")
    source, out = args.source.absolute(), args.out.absolute()
    if source == out or source in out.parents:
        raise InputError(f"--out {args.out} lies in {args.source}, whose pictures are prompts; give another folder")


def _load(pipe: StableDiffusion, fit: str, row: Row) -> Prepared | None:
    """What the image encoder sees of a row's pictures."""
    return pipe.adapters[0].prepare([str(path) for path in row.images], fit) if row.images else None


def _make(pipe: StableDiffusion, args: Batch, given: list[tuple[Work, Prepared | None]]) -> Sequence[Image.Image]:
    """The pictures of a batch; a short one is filled up with its last, so that all are one program."""
    filled = given + given[-1:] * (args.batch_size - len(given))
    works, prompts = zip(*filled, strict=True)
    arguments = args.arguments()
    if prompts[0] is None:
        pipe = dataclasses.replace(pipe, adapters=())
        arguments |= {"negative_ip_adapter_image": None, "ip_adapter_uncond": "default"}
    else:
        arguments["ip_adapter_image"] = PerPrompt(prompts)
        arguments["ip_adapter_scale"] = PerPrompt(args.scale_of(work.scale) for work in works)
    found = pipe(
        [work.row.prompt for work in works],
        negative_prompt=[work.row.negative_prompt or args.negative_prompt for work in works],
        seed=[work.seed for work in works],
        **arguments,
    )
    return found[: len(given)]


def _settings(args: Batch, pipe: StableDiffusion) -> dict[str, Any]:
    """All that the pictures depend on beside the rows, as JSON has it."""
    apart = ("source", "out", "batch_size", "process", "processes")  # a picture is the same in any batch
    settings: dict[str, Any] = {name: value for name, value in dataclasses.asdict(args).items() if name not in apart}
    settings["guidance_scale"] = pipe.guidance_scale if args.guidance_scale is None else args.guidance_scale
    return json.loads(json.dumps({**settings, "sha256": digests(pipe), "versions": versions()}))


def _metadata(settings: dict[str, Any], work: Work) -> dict[str, Any]:
    """What stands in a picture's file."""
    row = work.row
    own = {"prompt": row.prompt, "image": [str(path) for path in row.images], "seed": work.seed, "scale": work.scale}
    own["negative_prompt"] = row.negative_prompt or settings["negative_prompt"]
    return {**settings, **own}
