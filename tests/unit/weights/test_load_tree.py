"""From named tensors to a tree: every number as numpy casts it, every fault named before anything is read."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from weight_files import refused

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights import load_tree as tree_module
from ipadapter_jax.weights.dtype_cast import all_finite
from ipadapter_jax.weights.key_mapping import FLAX, torch_layout
from ipadapter_jax.weights.load_tree import check_tree, leaves, nest

FLOATS = [np.dtype(kind) for kind in ("float32", "float16", "bfloat16")]
FLOAT32 = np.dtype("float32")


@dataclasses.dataclass
class Tensor:
    """A tensor of a file; `reads` notes what was read."""

    array: np.ndarray
    reads: list

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def read(self):
        self.reads.append(self.shape)
        return self.array


TEMPLATE = {
    "conv": {"kernel": (3, 2, 5, 70), "bias": (70,)},
    "dense": {"kernel": (70, 33)},
    "norm": {"scale": (4,)},
    "none": {"kernel": (0, 3)},
    "embedding": {"embedding": (6, 4)},
    "latents": (1, 2, 3),
    "scalar": (),
}


def template():
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, FLOAT32), TEMPLATE, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )


def file(dtype=FLOAT32, **changes) -> tuple[dict[str, Tensor], list]:
    """All tensors of a fitting PyTorch file but for the changes (dots written __; None leaves out), and the reads."""
    rng, reads, spelling = np.random.default_rng(0), [], torch_layout()
    arrays = {
        spelling.key(path): rng.standard_normal(spelling.shape(path, leaf.shape)).astype(dtype)
        for path, leaf in leaves(template()).items()
    }
    arrays |= {key.replace("__", "."): array for key, array in changes.items()}
    return {key: Tensor(np.asarray(array), reads) for key, array in arrays.items() if array is not None}, reads


def load(tensors, dtype=FLOAT32, **options):
    return check_tree(tensors, template(), torch_layout(), source="a.bin").load(dtype, **options)


def test_leaves_and_nest():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert leaves(tree) == {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert nest(leaves(tree)) == tree


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("stored", [*FLOATS, np.dtype("float64")])
def test_every_number_is_cast_as_numpy_does(stored, target):
    tensors, reads = file(stored)
    tree = load(tensors, target)
    assert len(reads) == len(tensors)  # each once
    transposed = {2: (1, 0), 4: (2, 3, 1, 0)}
    for path, array in leaves(tree).items():
        expected = tensors[torch_layout().key(path)].array
        if path[-1] == "kernel":
            expected = expected.transpose(transposed[expected.ndim])
        expected = expected.astype(target)
        assert isinstance(array, jax.Array) and (array.shape, array.dtype) == (expected.shape, target), path
        assert np.asarray(array).tobytes() == expected.tobytes(), path


@pytest.mark.parametrize("stored", FLOATS)
def test_arrays_with_gaps(stored):
    """A pickle may give a tensor any strides."""
    wide = np.arange(140, dtype=np.float32).astype(stored)
    tensors, _ = file(conv__bias=wide[::2], dense__weight=np.ones((33, 140), stored)[:, ::2])
    tree = load(tensors)
    assert np.array_equal(tree["conv"]["bias"], np.arange(0, 140, 2)) and np.all(tree["dense"]["kernel"] == 1)


def test_arrays_are_ours_and_as_jax_wants_them():
    """Not views of the file, which may be overwritten later; and a CPU device uses them without another copy."""
    tensors, _ = file()
    pairs = []

    def put(array):
        pairs.append((array, jax.device_put(array, jax.devices("cpu")[0])))
        return pairs[-1][1]

    load(tensors, put=put)
    for array, used in pairs:
        assert array.flags.c_contiguous and not any(np.shares_memory(array, t.array) for t in tensors.values())
        assert not array.size or np.asarray(used).ctypes.data == array.ctypes.data


def test_the_largest_tensors_come_first(monkeypatch):
    monkeypatch.setattr(tree_module, "_THREADS", 1)
    tensors, reads = file()
    load(tensors)
    sizes = [np.prod(shape) for shape in reads]
    assert len(sizes) == len(tensors) and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm__weight": None}, ["lacks norm.weight; is this file for another model?"]),
        ({"norm__weight": None, "scalar": None}, ["lacks norm.weight, scalar;"]),
        ({"extra__weight": np.zeros(3)}, ["without a place in the model: extra.weight;"]),
        (
            {f"extra__{i}": np.zeros(3) for i in range(9)},
            ["without a place in the model: extra.0, extra.1, extra.2 and 6 more;"],
        ),
        ({"dense__weight": np.zeros((70, 33))}, ["dense.weight has shape (70, 33), not (33, 70)"]),
        ({"conv__weight": np.zeros((3, 2, 5, 70))}, ["conv.weight has shape (3, 2, 5, 70), not (70, 5, 3, 2)"]),
        ({"norm__weight": np.zeros((4, 1))}, ["norm.weight has shape (4, 1), not (4,)"]),
        ({"norm__weight": np.zeros(4, np.int64)}, ["norm.weight holds int64 numbers"]),
        ({"norm__weight": np.zeros(4, np.complex64)}, ["norm.weight holds complex64 numbers"]),
        ({"norm__weight": np.zeros(4, bool)}, ["norm.weight holds bool numbers"]),
    ],
)
def test_faults_found_before_anything_is_read(changes, words):
    tensors, reads = file(**changes)
    refused(lambda: load(tensors), "a.bin: ", *words, error=WeightFileError)
    assert not reads


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["dense.weight", "conv.bias", "scalar"])
def test_numbers_that_are_not_finite(key, value, target):
    tensors, _ = file()
    tensors[key].array.reshape(-1)[-1] = value
    refused(lambda: load(tensors, target), "a.bin: ", f"{key} holds NaN or infinity", error=WeightFileError)


@pytest.mark.parametrize(
    ("value", "target", "fits"),
    [
        (65504, "float16", True),
        (65520, "float16", False),
        (-65520, "float16", False),
        (65520, "bfloat16", True),
        (3.4e38, "bfloat16", False),  # rounds up to infinity
        (3.4e38, "float32", True),
        (-1e39, "float32", False),
        (1e-9, "float16", True),  # becomes 0, as PyTorch's cast does
    ],
)
def test_overflow(value, target, fits):
    tensors, _ = file(norm__weight=np.array([1, value, 1, 1], np.float64))
    if fits:
        assert load(tensors, np.dtype(target))["norm"]["scale"][1] == np.float64(value).astype(target)
    else:
        words = [
            "a.bin: norm.weight reaches",
            f"too large for {target}",
            "use another file" if target == "float32" else "use float32",
        ]
        refused(lambda: load(tensors, np.dtype(target)), *words, error=WeightFileError)


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_finite_agrees_with_numpy(dtype):
    """On every pattern of 16 bits; of 32 bits on those around the edges."""
    edges = np.array([0, 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], np.uint32)
    patterns = np.arange(1 << 16, dtype=np.uint16) if dtype.itemsize == 2 else np.r_[edges, edges | np.uint32(1 << 31)]
    finite = np.isfinite(patterns.view(dtype).astype(np.float32))
    assert [all_finite(pattern.view(dtype)) for pattern in patterns[:, None]] == finite.tolist()
    assert all_finite(patterns[finite].view(dtype)) and not all_finite(patterns.view(dtype))
    assert all_finite(np.zeros((0, 3), dtype))


def test_flax_spelling_keeps_names_and_axes():
    tensors = {
        ".".join(path): Tensor(np.ones(leaf.shape, ml_dtypes.bfloat16), []) for path, leaf in leaves(template()).items()
    }
    tree = check_tree(tensors, template(), FLAX, source="a.msgpack").load(FLOAT32)
    assert tree["conv"]["kernel"].shape == (3, 2, 5, 70)
