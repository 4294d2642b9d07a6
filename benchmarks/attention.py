"""Attention here and in PyTorch (scaled_dot_product_attention), for every shape of Stable Diffusion 1.5 at 512 px.

    python -m benchmarks.attention                                  CPU
    python -m benchmarks.attention --dtype bfloat16 --batch 32      NVIDIA GPU

Measures self-attention, and the sum of text and image attention as in the adapter. Both run in this process, in turns,
on the same numbers; the medians are printed. Before a shape is timed, both results must agree. Needs the extra `torch`.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.compare_with_diffusers import require_peers
from benchmarks.interleaved_timing import seconds_in_turns
from ipadapter_jax.ops.attention import AttentionBranch, attend

HEADS, TEXT, IMAGE, SCALE = 8, 77, 4, 0.7
SHAPES = ((4096, 320), (1024, 640), (256, 1280), (64, 1280))  # positions, width
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Prints one table."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch: Annotated[int, tyro.conf.arg(help="rows; guidance makes two of an image")] = 2
    backward: Annotated[bool, tyro.conf.arg(help="time the gradients for all inputs, too")] = False
    rounds: int = 7


def sides(settings: Settings, positions: int, width: int, cross: bool) -> dict[str, Callable[[], Any]]:
    """Each side's attention on the same random inputs; its result, or with `backward` the queries' gradient."""
    import torch

    rng, rows = np.random.default_rng(0), settings.batch
    lengths = (positions, *((TEXT, TEXT, IMAGE, IMAGE) if cross else (positions, positions)))
    arrays = [rng.standard_normal((rows, length, width), np.float32) for length in lengths]
    ours = [jnp.asarray(x, settings.dtype) for x in arrays]
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    theirs = [torch.from_numpy(x).to(device, getattr(torch, settings.dtype)) for x in arrays]

    def in_jax(q: Any, *kv: Any) -> Any:
        weights = (1.0, jnp.float32(SCALE))
        branches = [AttentionBranch(k, v, weight) for k, v, weight in zip(kv[::2], kv[1::2], weights, strict=False)]
        return attend(q, branches, HEADS)

    def in_torch(*given: Any) -> Any:
        q, *kv = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in given)
        attention = torch.nn.functional.scaled_dot_product_attention
        parts = [attention(q, k, v) for k, v in zip(kv[::2], kv[1::2], strict=True)]
        out = parts[0] + SCALE * parts[1] if cross else parts[0]
        return out.transpose(1, 2).flatten(2)

    def jax_gradients(*given: Any) -> Any:
        return jax.grad(lambda *x: in_jax(*x).astype(jnp.float32).sum(), argnums=tuple(range(len(given))))(*given)

    forward, gradients = jax.jit(in_jax), jax.jit(jax_gradients)

    def run_ours() -> Any:
        return jax.block_until_ready(gradients(*ours)[0] if settings.backward else forward(*ours))

    def run_theirs() -> Any:
        given = [x.detach().requires_grad_(settings.backward) for x in theirs]
        with torch.set_grad_enabled(settings.backward):
            found = in_torch(*given)
        if settings.backward:
            found.float().sum().backward()
            found = given[0].grad
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    return {"ours": run_ours, "PyTorch": run_theirs}


def difference(ours: Any, theirs: Any) -> float:
    return float(np.abs(np.asarray(ours, np.float32) - theirs.detach().float().cpu().numpy()).max())


def main(settings: Settings) -> None:
    require_peers()
    print("| attention | ours, ms | PyTorch, ms | PyTorch / ours |\n|---|---:|---:|---:|")
    for positions, width in SHAPES:
        for cross in (False, True):
            runs = sides(settings, positions, width, cross)
            error = difference(*(run() for run in runs.values()))  # which also warms up
            if not error < TOLERANCES[settings.dtype]:
                sys.exit(f"no numbers: the sides are {error:.1e} apart at {positions} positions")
            times = seconds_in_turns(runs, settings.rounds)
            ours, theirs = (1e3 * statistics.median(found) for found in times.values())
            name = f"{positions} x {f'({TEXT} + {IMAGE})' if cross else positions}, heads of {width // HEADS}"
            print(f"| {name} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} |")
    what = "forward and backward" if settings.backward else "forward"
    print(f"\n- {jax.devices()[0].device_kind}, {settings.dtype}, batch {settings.batch}, {what}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
