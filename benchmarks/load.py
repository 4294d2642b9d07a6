"""The time and memory to load a base model from its files, compared with PyTorch.

    python -m ipadapter_jax.testing.random_weights --size full --out weights/full
    python -m benchmarks.load --weights weights/full

Ours: the weights of UNet, VAE and text encoder as new float32 arrays on the device, checked and finite. PyTorch:
load_file, load_state_dict into float32 modules, and one read of every tensor (its loader alone only maps the file);
once into modules whose memory is already in use, and once into new memory like ours. The system's work for new pages is
most of the difference. All run in turns in one process, from files in the page cache. Needs the extra `torch`.
"""

import re
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from benchmarks.interleaved_timing import seconds_in_turns
from ipadapter_jax.weights.open_base_model import open_base
from ipadapter_jax.weights.open_component import read_json

GOAL_TIME, GOAL_MEMORY = 3.0, 1.3


def main(
    weights: Annotated[Path, tyro.conf.arg(help="a folder in diffusers' layout")],
    runs: Annotated[int, tyro.conf.arg(help="of which the median is shown")] = 5,
) -> int:
    """Prints both times, their ratio and our peak of anonymous memory."""
    modules = dict(_modules(weights))
    peak = _peak(lambda: ours(weights))  # traces the networks, too, and brings the files into the page cache
    _torch(modules)
    jobs = {
        "ours": lambda: ours(weights),
        "PyTorch": lambda: _torch(modules),
        "PyTorch, new memory": lambda: _torch(modules, new=True),
    }
    times = seconds_in_turns(jobs, runs)
    for name, seconds in times.items():
        print(f"{name}: {statistics.median(seconds):.2f} s (from {min(seconds):.2f} to {max(seconds):.2f})")
    for name in [*jobs][1:]:
        ratio = statistics.median(times["ours"]) / statistics.median(times[name])
        print(f"ours / {name}: {ratio:.2f} (goal: at most {GOAL_TIME})")
    print(f"peak anonymous memory / size of the arrays: {peak:.2f} (goal: at most {GOAL_MEMORY})")
    return 0


def ours(weights: Path) -> Any:
    base = open_base(weights)
    params = {name: base.part(name).load(jax.numpy.dtype("float32")).params for name in base.components}
    return jax.block_until_ready(params)


def _modules(weights: Path) -> Iterator[tuple[Path, Any]]:
    """PyTorch's networks, built from the configurations alone, by their weight files."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    for part, network in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        yield _file(weights / part), network.from_config(read_json(weights / part / "config.json"))
    yield _file(weights / "text_encoder"), CLIPTextModel(CLIPTextConfig.from_pretrained(weights / "text_encoder"))


def _file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def _torch(modules: dict[Path, Any], new: bool = False) -> None:
    from safetensors.torch import load_file

    for file, module in modules.items():
        if new:
            module.to_empty(device="cpu")
        tensors = load_file(file)
        names = module.state_dict().keys()
        if not tensors.keys() & names:  # transformers dropped this prefix
            tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        module.load_state_dict({name: tensors[name] for name in names if name in tensors}, strict=False)
        for tensor in module.state_dict().values():
            tensor.sum()


def _peak(job: Callable[[], Any]) -> float:
    """The growth of anonymous memory at its peak in sizes of the arrays that `job` returns. It must be the first job:
    later ones find memory that earlier ones have left."""
    before, peak, done = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = job()
    peak[0] = max(peak[0], _anonymous())
    done.set()
    watcher.join()
    return (peak[0] - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(result))


def _anonymous() -> int:
    """Bytes of this process that are no pages of a file."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
