"""The msgpack reader against flax's own, and against files that lie."""

import random
import re
import struct
import tracemalloc
from pathlib import Path

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
from helpers import within
from weight_files import refused

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.formats.msgpack_file import read_msgpack_file
from ipadapter_jax.weights.load_tree import leaves


def write(path: Path, content) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else flax.serialization.msgpack_serialize(content))
    return path


def some(*shape, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


TREES = {
    "shapes": {
        "scalar": np.array(2.5, np.float32),
        "empty": some(0),
        "empty_matrix": some(3, 0, 2),
        "one": some(1),
        "kernel": some(3, 3, 4, 5),
        "large": some(200, 100),  # its length takes four bytes
        "columns": np.asfortranarray(some(4, 5)),
        "many_axes": some(*[1, 2] * 7),
    },
    "dtypes": {
        name: (10 * some(3, 4)).astype(name)
        for name in ("float32", "float16", "float64", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    },
    "odd addresses": {"a" * n: some(5) for n in range(1, 9)},
    "long names": {"n" * length: some(2) for length in (31, 32, 255, 256, 1000)} | {"é中": some(1), "": some(3)},
    "15 entries": {str(i): some(1) for i in range(15)},
    "16 entries": {str(i): some(1) for i in range(16)},
    "70000 entries": {str(i): np.float32([i]) for i in range(70_000)},
    "nested": {"a": {"b": {"c": {"d": some(2)}, "empty": {}}}, "e": some(3)},
    "no entries": {},
    "lengths": {str(n): np.zeros(n, np.uint8) for n in (*range(60), 127, 128, 250, 255, 256, 65535, 65536)},
}


@pytest.mark.parametrize("name", TREES)
def test_equal_to_flax(tmp_path, name):
    path = write(tmp_path / "a.msgpack", TREES[name])
    tensors = read_msgpack_file(path)
    expected = {
        ".".join(key): array for key, array in leaves(flax.serialization.msgpack_restore(path.read_bytes())).items()
    }
    assert list(tensors) == list(expected)
    for key, array in expected.items():
        read = tensors[key].read()
        assert tensors[key].shape == read.shape == array.shape and tensors[key].dtype == read.dtype == array.dtype
        assert read.tobytes() == array.tobytes(), key


def test_nothing_is_read_but_the_headers(tmp_path):
    path = write(tmp_path / "a.msgpack", {str(i): np.zeros(1 << 22, np.uint8) for i in range(4)})
    tracemalloc.start()
    tensors = read_msgpack_file(path)
    views = [tensor.read() for tensor in tensors.values()]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20 and not any(view.flags.owndata or view.flags.writeable for view in views)


# --- files by hand -----------------------------------------------------------------------------------------------


def text(name: str | bytes) -> bytes:
    raw = name if isinstance(name, bytes) else name.encode()
    return bytes([0xA0 + len(raw)]) + raw


def array(shape=b"\x91\x02", dtype="float32", data=b"\xc4\x08" + bytes(8), items=b"\x93") -> bytes:
    return items + shape + text(dtype) + data


def extension(payload: bytes, kind=1, length: int | None = None) -> bytes:
    return b"\xc9" + struct.pack(">IB", len(payload) if length is None else length, kind) + payload


def entry(value: bytes = extension(array()), name: str | bytes = "w") -> bytes:
    return text(name) + value


FINE = b"\x81" + entry()


def test_the_hand_made_file_is_fine(tmp_path):
    assert read_msgpack_file(write(tmp_path / "a.msgpack", FINE))["w"].read().tolist() == [0, 0]


HOSTILE = {
    "empty": b"",
    "no map": extension(array()),
    "a number": b"\x07",
    "a list": b"\x91" + extension(array()),
    "bytes follow after its end": FINE + b"\0",
    "a name is not text": b"\x81\x01" + extension(array()),
    "a name is too long": b"\x81\xdb" + struct.pack(">I", 1 << 20) + b"n" * (1 << 20) + extension(array()),
    "a name longer than the file": b"\x81\xd9\xff" + extension(array()),
    "a name that is no UTF-8": b"\x81" + entry(name=b"\xff\xfe"),
    "more entries than there are": b"\xdf\xff\xff\xff\xff" + entry(),
    "two tensors are called 'w'": b"\x82" + entry() * 2,
    "two tensors are called 'a.w'": b"\x82" + entry(b"\x81" + entry(), "a") + entry(name="a.w"),
    "two maps of one name": b"\x82" + entry(b"\x81" + entry(), "a") * 2,
    "nested too deep": b"".join(b"\x81" + text("a") for _ in range(100)) + b"\x80",
    "nested far too deep": (b"\x81" + text("a")) * 300_000 + b"\x80",
    "nil": b"\x81" + entry(b"\xc0"),
    "true": b"\x81" + entry(b"\xc3"),
    "a plain number": b"\x81" + entry(b"\xca\0\0\0\0"),
    "a complex number": b"\x81" + entry(extension(array(), kind=2)),
    "a numpy scalar": b"\x81" + entry(extension(array(), kind=3)),
    "an unknown extension": b"\x81" + entry(extension(array(), kind=255)),
    "an array longer than the file": b"\x81" + entry(extension(array(), length=1 << 31)),
    "an array shorter than its content": b"\x81" + entry(extension(array(), length=10)),
    "an array longer than its content": b"\x81" + entry(extension(array() + b"\0")),
    "two items": b"\x81" + entry(extension(array(items=b"\x92"))),
    "no shape": b"\x81" + entry(extension(array(shape=b"\x02"))),
    "a negative size": b"\x81" + entry(extension(array(shape=b"\x91\xff"))),
    "a fractional size": b"\x81" + entry(extension(array(shape=b"\x91\xca\x40\0\0\0"))),
    "a size that overflows": b"\x81" + entry(extension(array(shape=b"\x92" + b"\xcf\x80\0\0\0\0\0\0\0" * 2))),
    "no elements, but a vast size": b"\x81"
    + entry(extension(array(shape=b"\x92\0\xcf\x7f" + b"\xff" * 7, data=b"\xc4\0"))),
    "fewer bytes than the shape": b"\x81" + entry(extension(array(data=b"\xc4\x07" + bytes(7)))),
    "more bytes than the shape": b"\x81" + entry(extension(array(data=b"\xc4\x09" + bytes(9)))),
    "text instead of bytes": b"\x81" + entry(extension(array(data=b"\xa8" + bytes(8)))),
    "an object array": b"\x81" + entry(extension(array(dtype="object"))),
    "a structured array": b"\x81" + entry(extension(array(dtype="f4,f4", shape=b"\x91\x01"))),
    "an empty array in 1 byte": b"\x81" + entry(b"\xd4\x01\0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path, name):
    path = write(tmp_path / "a.msgpack", HOSTILE[name])
    tracemalloc.start()
    with within(5):
        message = refused(lambda: read_msgpack_file(path), f"{path}: ", error=WeightFileError)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    if name in ("bytes follow after its end", "a name is too long") or name.startswith("two tensors"):
        assert name in message


def test_names_that_multiply(tmp_path):
    """A few long names before many short ones would take gigabytes when joined."""
    many = b"\xde\xff\xff" + b"".join(text(f"{i:x}") + extension(array()) for i in range(0xFFFF))
    for _ in range(20):
        many = b"\x81\xda" + struct.pack(">H", 1000) + b"n" * 1000 + many
    tracemalloc.start()
    refused(lambda: read_msgpack_file(write(tmp_path / "a.msgpack", many)), "too many names", error=WeightFileError)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_truncated_anywhere(tmp_path):
    content = flax.serialization.msgpack_serialize({"a": {"b": some(2, 3), "c": some(70)}, "d": np.float16([1])})
    for length in range(len(content)):
        path = write(tmp_path / "a.msgpack", content[:length])
        with pytest.raises(WeightFileError):
            read_msgpack_file(path)


def test_random_damage(tmp_path):
    """Either it is refused, or every tensor can be read: damage inside numbers and names cannot be seen."""
    content = flax.serialization.msgpack_serialize({"a": {"b": some(2, 3), "c": some(70)}, "d" * 40: np.float16([1])})
    headers = [
        m.start() + i for m in re.finditer(rb"[\x80-\x8f\xc4-\xc9\xd4-\xdf]|float", content) for i in range(-2, 8)
    ]
    rng, path, seen = random.Random(0), tmp_path / "a.msgpack", 0
    with within(20):
        for _ in range(3000):
            damaged = bytearray(content)
            for _ in range(rng.choice((1, 1, 2, 5))):
                place = rng.choice(headers) if rng.random() < 0.7 else rng.randrange(len(damaged))
                damaged[min(max(place, 0), len(damaged) - 1)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            path.write_bytes(damaged)
            try:
                for tensor in read_msgpack_file(path).values():
                    assert tensor.read().shape == tensor.shape
            except WeightFileError as error:
                assert str(error).isprintable()
                seen += 1
    assert 1000 < seen < 3000


def test_bfloat16_is_not_a_void(tmp_path):
    path = write(tmp_path / "a.msgpack", {"w": np.array([1.5, -3], ml_dtypes.bfloat16)})
    assert read_msgpack_file(path)["w"].read().astype(np.float32).tolist() == [1.5, -3]


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.complex64, np.uint16])
def test_numbers_that_are_not_read_are_named(tmp_path, dtype):
    path = write(tmp_path / "a.msgpack", {"a": {"kernel": np.ones((3, 3), dtype)}, "b": some(3)})
    with pytest.raises(WeightFileError, match=f"'a.kernel' is stored as {np.dtype(dtype).name}; .* convert the file"):
        read_msgpack_file(path)
