"""A checksum of every array of a tree, computed on the devices and independent of the sharding.

The checksum of a leaf is two sums modulo 2^32 over its elements, of the element's bits mixed with its index:

    y = mix(bits ^ mix(index)),    sum of y,    sum of mix(y + constant)

`index` counts the elements of the global array in row-major order. Addition modulo 2^32 has no order and no rounding:
the sums are exact, the same on any number of devices and processes, and nothing is gathered.

One changed element is always noticed: `mix` is a bijection of 32-bit numbers, and so is the exclusive or with a
fixed number. At a fixed index other bits give another y, and as no other term changes, both sums change. Changes of
several elements, exchanged ones among them, pass with a chance of about 2^-64. This detects accidents, not
attacks.
"""

import functools
import hashlib
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from ipadapter_jax.runtime.trees import Leaf, PyTree

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def tree_checksums(tree: PyTree) -> dict[str, str]:
    """{path: checksum} of all leaves, each a jax.Array of at most 32 bits per element. A checksum begins with the dtype
    and shape of its leaf.

    A leaf with a NamedSharding must have a mesh of Auto axes. In a job of several processes all of them call this.
    """
    leaves = named_leaves(tree)
    # One after the other: concurrent programs may meet those of another process in another order, and deadlock.
    sums = [jax.device_get(_sums(leaf, _replicated_like(leaf))) for leaf in leaves.values()]
    return {
        name: f"{dtype_and_shape(leaf)}:{first:08x}{second:08x}"
        for (name, leaf), (first, second) in zip(leaves.items(), sums, strict=True)
    }


def tree_fingerprint(checksums: Mapping[str, str]) -> str:
    """One sha256 for the checksums of a whole tree."""
    return hashlib.sha256(json.dumps(dict(checksums), sort_keys=True).encode()).hexdigest()


def dtype_and_shape(leaf: Leaf) -> str:
    """The dtype and shape of a leaf: float32[3,4]."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def parse_dtype_and_shape(text: str) -> jax.ShapeDtypeStruct:
    """The inverse of `dtype_and_shape`, on the first device."""
    dtype, _, sizes = text.removesuffix("]").partition("[")
    shape = tuple(int(size) for size in sizes.split(",") if size)
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=SingleDeviceSharding(jax.local_devices()[0]))


def named_leaves(tree: PyTree) -> dict[str, Leaf]:
    """{path: leaf}, the path in the manner of opt_state/0/mu/kernel. None and optax.MaskedNode have no leaves."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    if len(named) != len(flat):
        raise ValueError("two leaves of the tree have the same path")
    return named


def _replicated_like(leaf: Leaf) -> NamedSharding | None:
    return NamedSharding(leaf.sharding.mesh, P()) if isinstance(leaf.sharding, NamedSharding) else None


# One program for all leaves of a shape compiles and runs 3 times faster than one program for a whole UNet.
@functools.partial(jax.jit, static_argnums=1)
def _sums(leaf: Array, result: NamedSharding | None) -> Array:
    """The two sums of a leaf: (2,), with the sharding `result`."""
    mixed = _mix(_bits(leaf) ^ _mix(_index(leaf.shape)))
    terms = (mixed, _mix(mixed + jnp.uint32(0x9E3779B9)))
    sums = jnp.stack([jnp.sum(term, dtype=jnp.uint32) for term in terms])
    return sums if result is None else jax.lax.with_sharding_constraint(sums, result)


def _bits(leaf: Array) -> Array:
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)


def _index(shape: tuple[int, ...]) -> Array:
    """The index of every element in row-major order, modulo 2^32."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def _mix(x: Array) -> Array:
    """A bijection of 32-bit numbers in which every bit affects all others: the finalizer of MurmurHash3 (fmix32), made
    of exclusive or with a right shift and multiplication by an odd number, both of which can be undone."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
