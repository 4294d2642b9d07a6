"""Reads the adapter out of a checkpoint of a run, without starting the run."""

from pathlib import Path

import jax
import numpy as np

from ipadapter_jax.errors import InputError
from ipadapter_jax.train.run_dir import CHECKPOINTS
from ipadapter_jax.weights.ip_adapter_file import IPAdapterFile, to_adapter
from ipadapter_jax.weights.key_mapping import to_torch, torch_key
from ipadapter_jax.weights.lazy import Tensor, in_memory


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run of `ipadapter-jax train`, or one of its checkpoints (runs/mine/checkpoints/
    500)."""
    return (folder / CHECKPOINTS).is_dir() or _is_step(folder)


def _is_step(folder: Path) -> bool:
    return folder.is_dir() and folder.name.isdecimal() and folder.absolute().parent.name == CHECKPOINTS


def open_run(folder: Path) -> IPAdapterFile:
    """The adapter of a run's newest good checkpoint, or of the checkpoint named, of the moving average where the run
    keeps one, in float32. Raises InputError when no checkpoint is good, or when the run trains no whole adapter."""
    from ipadapter_jax.train.checkpoint import Checkpoints  # here, as it takes orbax a second to be imported

    step = int(folder.name) if _is_step(folder) else None
    checkpoints = Checkpoints(folder / CHECKPOINTS if step is None else folder.absolute().parent, read_only=True)
    try:
        found = checkpoints.leaves(step)
    finally:
        checkpoints.close()
    if found is None:
        raise InputError(f"{folder}: nothing was saved yet; wait for the first checkpoint")
    step, leaves = found
    part = "ema/" if any(name.startswith("ema/") for name in leaves) else "params/"
    tensors: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        place = tuple(name.removeprefix(part).split("/"))
        if name.startswith(part) and place[0] in ("image_proj", "ip_adapter"):
            tensors[torch_key(place)] = in_memory(to_torch(place, np.asarray(jax.device_get(leaf))))
    if not tensors:
        raise InputError(f"{folder}: this run trained no adapter; its UNet lies in {folder / 'unet'}")
    return to_adapter(folder, tensors, {"step": str(step)})
