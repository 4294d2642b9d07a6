"""Attention kernels that never write the logits to memory: cuDNN's on NVIDIA GPUs, JAX's own on TPUs ("splash").

Both are for half precision. float32 is for comparing, and is computed as it is written down.
"""

import concurrent.futures
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from ipadapter_jax.ops.batch_sharding import is_batch_sharded

Kernel = Callable[[Array, Array, Array], Array]
"""Queries (B, L, C), keys and values (B, S, C) -> softmax(q k^T / sqrt(d)) v for every head, (B, L, C)."""

_FEWEST_POSITIONS = {"gpu": 256, "tpu": 1024}  # below, the logits are small and the plain products quicker
_LANES = 128  # of a TPU: the kernel's blocks are multiples of it
_AGREED: set[tuple[int, np.dtype]] = set()  # depths and dtypes that cuDNN runs in every process of a run of several
REFUSED: set[int] = set()  # depths that cuDNN should have had on this GPU, and has not


def kernel_for(query: Sequence[int], key: Sequence[int], num_heads: int, dtype: DTypeLike) -> Kernel | None:
    """The kernel for queries (B, L, C) and keys (B, S, C) on this process's devices, or None where there is none."""
    platform, (_, length, width), positions = jax.default_backend(), query, key[1]
    depth = width // num_heads
    if jnp.dtype(dtype).itemsize != 2 or platform not in _FEWEST_POSITIONS or not is_batch_sharded():
        return None
    if min(length, positions) < _FEWEST_POSITIONS[platform]:
        return None
    if platform == "gpu":
        return functools.partial(_cudnn, num_heads) if cudnn_runs(depth, jnp.dtype(dtype)) else None
    whole = length % _LANES == positions % _LANES == 0 and jnp.dtype(dtype) == jnp.bfloat16  # TPUs have no float16
    return functools.partial(_splash, num_heads) if whole else None


def named_kernel(depth: int, dtype: DTypeLike) -> str | None:
    """What long self-attention with heads of this depth is computed by on this process's devices, for a person."""
    platform = jax.default_backend()
    if platform == "gpu" and cudnn_runs(depth, jnp.dtype(dtype)):
        return "cuDNN"
    return "Pallas (splash)" if platform == "tpu" else None


def _split_heads(num_heads: int, *arrays: Array) -> list[Array]:
    """(B, L, C) -> (B, L, heads, d)."""
    return [x.reshape(*x.shape[:2], num_heads, -1) for x in arrays]


def _cudnn(num_heads: int, query: Array, key: Array, value: Array) -> Array:
    out = jax.nn.dot_product_attention(*_split_heads(num_heads, query, key, value), implementation="cudnn")
    return out.reshape(query.shape)


def agree(depths: Iterable[int], dtype: DTypeLike) -> None:
    """Lets cuDNN be used in a run of several processes, for heads of those depths that it runs in all of them: where it
    failed in one alone, the programs would differ, and a run whose programs differ hangs. Without this none is used.

    All processes call this, before anything is traced. With one process it does nothing.
    """
    if jax.process_count() == 1:
        return
    asked = sorted(set(depths))
    runs = np.array([_cudnn_runs(depth, jnp.dtype(dtype)) for depth in asked])
    everywhere = multihost_utils.process_allgather(runs).reshape(-1, len(asked)).all(axis=0)
    _AGREED.update((depth, jnp.dtype(dtype)) for depth, yes in zip(asked, everywhere, strict=True) if yes)


def cudnn_runs(depth: int, dtype: np.dtype) -> bool:
    """Whether cuDNN's attention is to be used for heads of this depth: it runs here, and in all processes of the run
    (`agree`)."""
    if jax.process_count() > 1:
        return (depth, dtype) in _AGREED
    return _cudnn_runs(depth, dtype)


@functools.cache
def _cudnn_runs(depth: int, dtype: np.dtype) -> bool:
    """Whether cuDNN's attention compiles and runs for heads of this depth, with its gradient, on this process's GPU.

    What it takes depends on GPU, depth and the releases of cuDNN and XLA, and shows when a program is compiled: so a
    small one is tried. A GPU that should have it and has not is told of by a warning.
    """
    device = jax.local_devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    deepest = 256 if float(device.compute_capability) >= 9.0 else 128
    if float(device.compute_capability) < 8.0 or depth % 8 or depth > deepest:
        return False

    def loss(x: Array) -> Array:
        return _cudnn(2, x, x, x).astype(jnp.float32).sum()

    def run() -> None:
        x = jax.device_put(np.ones((1, 256, 2 * depth), dtype), device)
        jax.block_until_ready(jax.jit(jax.grad(loss))(x))

    try:
        with concurrent.futures.ThreadPoolExecutor(1) as own:  # this one is in the middle of tracing
            own.submit(run).result()
    except Exception as error:  # of Python, XLA or cuDNN, of any kind
        reason = str(error).partition("\n")[0]
        REFUSED.add(depth)
        warnings.warn(f"cuDNN has no attention for heads of {depth} here, a slower one is used: {reason}", stacklevel=2)
        return False
    return True


def _splash(num_heads: int, query: Array, key: Array, value: Array, interpret: bool = False) -> Array:
    """Pallas's kernel; `interpret` runs it on any device, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    q, k, v = (x.transpose(0, 2, 1, 3) for x in _split_heads(num_heads, query, key, value))
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    rows, columns = (next(size for size in (512, 256, _LANES) if x.shape[2] % size == 0) for x in (q, k))
    of_queries = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), rows)
    kinds = ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq")
    blocks: Any = splash.BlockSizes(**of_queries, **dict.fromkeys(kinds, columns))  # pyright: ignore[reportArgumentType]
    mask = splash.MultiHeadMask([splash.FullMask((q.shape[2], k.shape[2]))] * num_heads)
    with jax.ensure_compile_time_eval():  # what is known of the mask holds for every trace
        kernel: Any = splash.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
    out: Any = jax.vmap(kernel)(q, k, v)
    return out.transpose(0, 2, 1, 3).reshape(query.shape)
