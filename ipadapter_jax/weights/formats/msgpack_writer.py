"""Named arrays as the bytes that `flax.serialization.to_bytes` gives for their tree, one array in memory at a time."""

from collections.abc import Iterator, Mapping

import msgpack

from ipadapter_jax.weights.formats.safetensors_writer import raw
from ipadapter_jax.weights.lazy import Tensor, TensorTree
from ipadapter_jax.weights.load_tree import nest

_NDARRAY = 1  # flax's type of extension: [shape, dtype, bytes]


def msgpack_chunks(tensors: Mapping[tuple[str, ...], Tensor]) -> Iterator[bytes]:
    """{path: tensor} -> a map of maps, names sorted, with arrays for leaves. No array may exceed 2^30 bytes, from where
    on flax writes them in pieces."""
    yield from _map(nest(dict(sorted(tensors.items()))), msgpack.Packer(strict_types=True))


def _map(tree: TensorTree, packer: msgpack.Packer) -> Iterator[bytes]:
    yield packer.pack_map_header(len(tree))
    for name, value in tree.items():
        yield packer.pack(name)
        if isinstance(value, Mapping):
            yield from _map(value, packer)
        else:
            content = msgpack.packb((value.shape, value.dtype.name, bytes(raw(value.read()))), use_bin_type=True)
            yield packer.pack(msgpack.ExtType(_NDARRAY, content))
