"""`ipadapter-jax batch`: thousands of pictures from a folder or a list."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Annotated

import tyro

from ipadapter_jax import embedded
from ipadapter_jax.adapters import Prepared
from ipadapter_jax.cli.many import Many, make_pictures
from ipadapter_jax.errors import InputError
from ipadapter_jax.jobs.plan import plan
from ipadapter_jax.jobs.rows import Row, read_rows
from ipadapter_jax.pipeline import StableDiffusion


@dataclasses.dataclass(kw_only=True)
class Batch(Many):
    """Makes pictures for every row of a list, on all devices, into a folder.

    The same command goes on after any stop, kill -9 included, without making a picture twice or losing one. Rows that
    cannot be used are skipped and listed in bad_rows.jsonl. Every picture depends on its own row and the options alone.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """A folder of reference pictures (name.jpg, its prompt in name.txt), or a .csv or .jsonl with the columns prompt,
    image (several separated by ; or as a list), negative_prompt, seed, scale, name."""
    out: Path
    """The folder for the pictures, with job.json, job.jsonl (a line for each picture) and bad_rows.jsonl."""


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
    works = plan(rows, num_images=args.num_images, seed=args.seed, scale=args.scale, shard=args.shard)
    load = functools.partial(_load, pipe, args.fit)
    tally = make_pictures(pipe, args, works, args.out, args.settings(pipe), load, bad)
    if tally.bad:
        name = "bad_rows.jsonl" if args.process == 0 else f"bad_rows-{args.process}.jsonl"
        print(f"{len(tally.bad)} rows could not be used, see {args.out / name}", file=sys.stderr)
    print(args.out)
    return tally.code


def _check(args: Batch) -> None:
    args.check()
    source, out = args.source.absolute(), args.out.absolute()
    if source == out or source in out.parents:
        raise InputError(f"--out {args.out} lies in {args.source}, whose pictures are prompts; give another folder")


def _load(pipe: StableDiffusion, fit: str, row: Row) -> Prepared | None:
    """What the image encoder sees of a row's pictures."""
    return pipe.adapters[0].prepare([str(path) for path in row.images], fit) if row.images else None
