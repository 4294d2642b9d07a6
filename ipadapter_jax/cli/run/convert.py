"""`ipadapter-jax convert`, done: weights from one format to another."""

import dataclasses
from pathlib import Path

from ipadapter_jax.cli.convert import Convert
from ipadapter_jax.errors import InputError
from ipadapter_jax.train.adapter_from_run import is_run, open_run
from ipadapter_jax.weights.convert import convert as run
from ipadapter_jax.weights.convert import only, save_adapter


def convert(args: Convert) -> int:
    """Converts and prints the name of what was written. Raises InputError."""
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    source, out, dtype = (options.pop(name) for name in ("source", "out", "dtype"))
    if is_run(Path(source)):
        if out.exists():
            raise InputError(f"{out} exists; choose another name, or remove it first")
        only("a run of training", options)
        save_adapter(out, open_run(Path(source)), dtype)
    else:
        run(source, out, dtype=dtype, **options)
    print(out)
    return 0
