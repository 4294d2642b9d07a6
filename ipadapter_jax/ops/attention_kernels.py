"""Attention kernels that never write the logits to memory: cuDNN's on NVIDIA GPUs, JAX's own on TPUs ("splash").

Both are used in half precision only. float32 is for comparisons and is always computed as XLA operations.
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

_FEWEST_POSITIONS = {"gpu": 256, "tpu": 1024}  # with fewer queries or keys, XLA operations are faster
_LANES = 128  # of a TPU: the sizes of the kernel's blocks are multiples of it
_AGREED: set[tuple[int, np.dtype]] = set()  # depths and dtypes that cuDNN runs in every process of a run of several
REFUSED: set[int] = set()  # depths that cuDNN should support on this GPU, but does not


def kernel_for(query: Sequence[int], key: Sequence[int], num_heads: int, dtype: DTypeLike) -> Kernel | None:
    """The kernel for queries (B, L, C) and keys (B, S, C) on this process's devices. None means XLA operations."""
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
    """The kernel of long self-attention with heads of this depth on this process's devices, as a name for a message."""
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
    """Allows cuDNN in a run of several processes, for those of the depths that it supports in all of them.

    If processes compiled different programs, the run would hang. So without this call cuDNN is not used in such a run.
    All processes call this before anything is traced. With one process it does nothing.
    """
    if jax.process_count() == 1:
        return
    asked = sorted(set(depths))
    runs = np.array([_cudnn_runs(depth, jnp.dtype(dtype)) for depth in asked])
    everywhere = multihost_utils.process_allgather(runs).reshape(-1, len(asked)).all(axis=0)
    _AGREED.update((depth, jnp.dtype(dtype)) for depth, yes in zip(asked, everywhere, strict=True) if yes)


def cudnn_runs(depth: int, dtype: np.dtype) -> bool:
    """Whether cuDNN's attention is used for heads of this depth: all processes of the run support it (`agree`)."""
    if jax.process_count() > 1:
        return (depth, dtype) in _AGREED
    return _cudnn_runs(depth, dtype)


@functools.cache
def _cudnn_runs(depth: int, dtype: np.dtype) -> bool:
    """Whether cuDNN's attention compiles and runs for heads of this depth, with its gradient, on this process's GPU.

    Whether it does depends on the GPU, the depth and the releases of cuDNN and XLA, and is known only when a program is
    compiled. So this compiles and runs a small one. It warns if it fails on a GPU that should support it.
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
        with concurrent.futures.ThreadPoolExecutor(1) as own:  # because this thread is tracing another program
            own.submit(run).result()
    except Exception as error:  # XLA and cuDNN raise exceptions of many classes
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
    with jax.ensure_compile_time_eval():  # the mask is a constant for every trace
        kernel: Any = splash.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
    out: Any = jax.vmap(kernel)(q, k, v)
    return out.transpose(0, 2, 1, 3).reshape(query.shape)
