"""Runs `ipadapter-jax convert`: weights from one format to another."""

from pathlib import Path

from ipadapter_jax.cli.convert import Convert
from ipadapter_jax.errors import InputError
from ipadapter_jax.train.adapter_from_run import is_run, open_run
from ipadapter_jax.weights.convert import convert as convert_weights
from ipadapter_jax.weights.convert import refuse_options, save_adapter


def convert(args: Convert) -> int:
    """Converts and prints the name of what was written. Raises InputError."""
    source = args.model_source(args.source)
    if is_run(Path(args.source)):
        if args.out.exists():
            raise InputError(f"{args.out} exists; choose another name, or remove it first")
        refuse_options("a training run", {"flax": args.flax, **source.options()})
        save_adapter(args.out, open_run(Path(args.source)), args.dtype)
    else:
        convert_weights(source, args.out, dtype=args.dtype, flax=args.flax)
    print(args.out)
    return 0
