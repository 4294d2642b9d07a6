"""Opening weight files: safetensors and its shards, and whatever lies under such a name by mistake or on purpose."""

import json
import os
import random
import struct
import tracemalloc
from pathlib import Path

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
from helpers import ADAPTERS, within
from safetensors.numpy import load_file, save_file
from weight_files import refused, write_bin

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.formats.shard_index import files_of
from ipadapter_jax.weights.formats.tensor_files import open_tensors

W = np.arange(6, dtype=np.float32).reshape(2, 3)


def shards(folder: Path, *contents: dict, **changes) -> Path:
    """model-0000i-of-0000n.safetensors and their index; `changes` replace entries of its weight_map."""
    names = {}
    for i, content in enumerate(contents, 1):
        shard = f"model-{i:05d}-of-{len(contents):05d}.safetensors"
        save_file(content, folder / shard)
        names |= dict.fromkeys(content, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": names | changes}))
    return index


def header(content: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def of(dtype="F32", shape=(2, 3), offsets=(0, 24)) -> dict:
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


# --- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint32", "bool"]
)
def test_equal_to_safetensors(tmp_path, dtype):
    content = {"a.b": (3 * W).astype(dtype), "scalar": np.array(1, dtype), "empty": np.zeros((0, 4), dtype)}
    save_file(content, tmp_path / "a.safetensors", metadata={"format": "pt"})
    tensors = open_tensors(tmp_path / "a.safetensors")
    assert tensors.keys() == content.keys()
    for name, array in content.items():
        read = tensors[name].read()
        assert tensors[name].shape == read.shape == array.shape and tensors[name].dtype == read.dtype == array.dtype
        assert read.tobytes() == array.tobytes()


def test_every_kind_of_file_gives_the_same_tensors(tmp_path):
    expected = load_file(ADAPTERS / "ip-adapter_tiny.safetensors")
    tree: dict = {"image_proj": {}, "ip_adapter": {}}
    for name, array in expected.items():
        part, key = name.split(".", 1)
        tree[part][key] = array
    half = len(expected) // 2
    sources = [
        ADAPTERS / "ip-adapter_tiny.safetensors",
        ADAPTERS / "ip-adapter_tiny.bin",
        write_bin(tmp_path / "a.bin", tree),
        shards(tmp_path, dict([*expected.items()][:half]), dict([*expected.items()][half:])),
    ]
    for source in sources:
        found = {name: tensor.read() for name, tensor in open_tensors(source).items()}
        assert found.keys() == expected.keys()
        assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items()), source


@pytest.mark.torch
def test_our_bin_is_one_for_torch(tmp_path):
    torch = pytest.importorskip("torch")
    content = {"a": {"w": W, "t": W.T, "half": W.astype(np.float16)}, "ids": np.arange(3)}
    found = torch.load(write_bin(tmp_path / "a.bin", content), weights_only=True)
    assert found["a"]["t"].shape == (3, 2) and found["a"]["half"].dtype == torch.float16
    for name, array in content["a"].items():
        np.testing.assert_array_equal(found["a"][name].numpy(), array)


def test_nothing_is_read_but_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({str(i): np.zeros(1 << 22, np.uint8) for i in range(4)}, path)
    tracemalloc.start()
    views = [tensor.read() for tensor in open_tensors(path).values()]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert not any(view.flags.owndata or view.flags.writeable for view in views)


def test_files_of_a_source(tmp_path):
    index = shards(tmp_path, {"a": W}, {"b": W})
    assert [file.name for file in files_of(index)] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    [first, _] = files_of(index)
    assert files_of(first) == [first]


# --- what is refused ---------------------------------------------------------------------------------------------

HTML = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1719125304\n"
SUFFIXES = [".safetensors", ".bin", ".ckpt", ".msgpack"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty; download it again"]),
        (b" \n", ["empty; download it again"]),
        (HTML, ["web page", "download the file itself"]),
        (POINTER, ["git-lfs pointer", "git lfs pull"]),
        (b"Entry not found", []),
        (bytes(range(256)) * 8, []),
        (b"\xff" * 2048, []),
    ],
    ids=["empty", "blank", "web page", "pointer", "text", "counting", "ones"],
)
def test_no_weights_at_all(tmp_path, suffix, content, words):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    refused(lambda: open_tensors(path), f"{path}: ", *words, error=WeightFileError)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".pt", ".json", ".txt", ""])
def test_the_content_decides_and_not_the_name(tmp_path, suffix):
    save_file({"w": W}, tmp_path / "a.safetensors")
    (tmp_path / "a.msgpack").write_bytes(flax.serialization.msgpack_serialize({"w": W}))
    for source in ("a.safetensors", "a.msgpack", write_bin(tmp_path / "a.bin", {"w": W})):
        path = tmp_path / f"renamed{suffix}"
        path.write_bytes((tmp_path / source).read_bytes())
        assert open_tensors(path)["w"].read().tobytes() == W.tobytes()


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"\x89HDF\r\n\x1a\n", "Keras"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"7z\xbc\xaf'\x1c", "7z"),
        (b"Rar!\x1a\x07", "RAR"),
        (b"\x89PNG\r\n\x1a\n", "image"),
    ],
)
def test_files_of_other_programs_are_named(tmp_path, head, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(head + bytes(100))
    refused(lambda: open_tensors(path), f"{path}: ", words, error=WeightFileError)


def test_places_without_a_file(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    refused(lambda: open_tensors(tmp_path / "folder.safetensors"), "is a folder, not a file", error=WeightFileError)
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(lambda: open_tensors(tmp_path / "pipe.safetensors"), "is a pipe or a device; give a file")
    refused(lambda: open_tensors(tmp_path / "none.bin"), "none.bin: there is no such file", error=WeightFileError)
    (tmp_path / "model.onnx").write_bytes(b"x")
    refused(lambda: open_tensors(tmp_path / "model.onnx"), "model.onnx: not a weight file", ".safetensors")


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".json"])
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"x")

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)  # the tests may run as root, who may read everything
    refused(lambda: open_tensors(path), f"{path}: cannot be read (Permission denied)", error=WeightFileError)


DATA = W.tobytes()
HOSTILE = {
    "length beyond the file": header(of(), DATA, length=1 << 40),
    "length of all bits": header(of(), DATA, length=(1 << 64) - 1),
    "length short": header(of(), DATA, length=10),
    "no JSON": header(b"{" * 100, DATA),
    "a list": header(b"[]"),
    "nested": header(b'{"w":' * 100_000, DATA),
    "offsets beyond the file": header(of(offsets=(0, 48)), DATA),
    "offsets backwards": header(of(offsets=(24, 0)), DATA),
    "offsets negative": header(of(offsets=(-24, 0)), DATA),
    "offsets too small": header(of(offsets=(0, 20)), DATA),
    "shape too large": header(of(shape=(1 << 62, 1 << 62)), DATA),
    "shape negative": header(of(shape=(-2, -3)), DATA),
    "shape of text": header(of(shape="23"), DATA),
    "hole": header(of(offsets=(8, 32)), DATA + bytes(8)),
    "bytes after the end": header(of(), DATA + bytes(8)),
    "overlap": header(of() | {"v": of()["w"]}, DATA),
    "entry as a list": header({"w": ["F32", [2, 3], [0, 24]]}, DATA),
    "dtype as an object": header({"w": {"dtype": {"F32": None}, "shape": [2, 3], "data_offsets": [0, 24]}}, DATA),
    "shape that numpy cannot hold": header(of(shape=(1 << 63, 0), offsets=(0, 0))),
    "too many axes": header(of(shape=(1,) * 99, offsets=(0, 4)), bytes(4)),
    "header of megabytes": header({f"{i:0100}": of(shape=(0,), offsets=(0, 0))["w"] for i in range(40_000)}),
    "two of one name": header(
        b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        bytes(1),
    ),
    "no dtype": header({"w": {"shape": [2, 3], "data_offsets": [0, 24]}}, DATA),
    "unknown dtype": header(of(dtype="F128"), DATA),
    "names of control characters": header({"w\n\x1b[31m": of()["w"]}, DATA),
    "a very long name": header({"w" * 100_000: of()["w"]}, DATA),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors(tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(HOSTILE[name])
    with within(5):
        refused(lambda: open_tensors(path), f"{path}: ", error=WeightFileError)


def test_truncated_and_damaged_safetensors(tmp_path):
    save_file({"a.weight": W, "b.weight": W.astype(ml_dtypes.bfloat16)}, tmp_path / "whole.safetensors")
    content, path, rng = (tmp_path / "whole.safetensors").read_bytes(), tmp_path / "a.safetensors", random.Random(0)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(WeightFileError):
            open_tensors(path)
    for _ in range(1000):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            for tensor in open_tensors(path).values():
                assert tensor.read().shape == tensor.shape
        except WeightFileError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_eight_bit_floats(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    path.write_bytes(header(of(dtype, offsets=(0, 6)), bytes(6)))
    refused(lambda: open_tensors(path), f"{path}: 'w' is stored as {dtype}; only float64", "convert the file first")


# --- shards ------------------------------------------------------------------------------------------------------


def test_an_index_under_another_name_and_one_that_names_itself(tmp_path):
    index = shards(tmp_path, {"w": W}, {"v": W})
    renamed = index.with_name("weights.safetensors")
    renamed.write_bytes(index.read_bytes())
    assert open_tensors(renamed).keys() == {"w", "v"} and len(files_of(renamed)) == 2
    renamed.write_text(json.dumps({"weight_map": {"w": renamed.name}}))
    refused(lambda: open_tensors(renamed), "is not a safetensors file", error=WeightFileError)
    renamed.write_text(json.dumps({"weight_map": {}}))
    assert open_tensors(renamed) == {}


@pytest.mark.parametrize(
    "shard",
    ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a.bin", "a\n.safetensors", "\0.safetensors"]
    + ["..\\a.safetensors", "C:\\a.safetensors", "http://x/a.safetensors"],
)
def test_an_index_that_points_elsewhere(tmp_path, shard):
    (tmp_path / "model").mkdir()
    save_file({"a": W}, tmp_path / "a.safetensors")
    index = shards(tmp_path / "model", {"b": W}, a=shard)
    words = [f"{index}: names a shard that is not a .safetensors file next to it: {shard!r}"]
    refused(lambda: open_tensors(index), *words, error=WeightFileError)


def test_shards_and_index_that_disagree(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = shards(tmp_path, {"a": W}, {"b": W}, c=first)
    refused(lambda: open_tensors(index), f"{index}: 'c' is not in {first}", error=WeightFileError)
    shards(tmp_path, {"a": W}, {"b": W, "a": W}, a=first)
    refused(lambda: open_tensors(index), f"{index}: 'a' is in {second}, contrary to the index", error=WeightFileError)
    shards(tmp_path, {"a": W}, {"b": W})
    (tmp_path / second).write_bytes(b"")
    refused(lambda: open_tensors(index), f"{tmp_path / second}: the file is empty", error=WeightFileError)
    (tmp_path / second).unlink()
    refused(lambda: open_tensors(index), f"{index}: the shard {second} is missing; download it too")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": 1}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": []}}',
    ]
    + ["{" * 100, '{"weight_map":' * 100_000, "\ufeff{}", HTML.decode()],
)
def test_no_index(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    refused(lambda: open_tensors(index), f"{index}: ", error=WeightFileError)
