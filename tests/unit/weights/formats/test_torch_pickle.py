"""The reader of torch.save files: against PyTorch where it is there, and against files built byte by byte."""

import argparse
import ast
import collections
import importlib
import os
import random
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import within

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.formats import pickle_interpreter, torch_pickle
from ipadapter_jax.weights.formats.pickle_interpreter import OPAQUE
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.formats.torch_pickle import UNNAMED, LazyTensor, flatten, read_torch_file

# --- files by hand -----------------------------------------------------------------------------------------------

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
PROTOCOL = b"\x80\x02M\xe9\x03."
NONE, FALSE, EMPTY_DICT = b"N", b"\x89", b"}"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    raw = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def sequence(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def function(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(key: str, numel: int, kind: str = "Float", *more: bytes) -> bytes:
    return sequence(text("storage"), function("torch", f"{kind}Storage"), text(key), text("cpu"), integer(numel), *more)


def tensor(key="0", shape=(2, 3), strides=(3, 1), offset=0, numel=6, kind="Float", more=()) -> bytes:
    shape, strides = (sequence(*map(integer, numbers)) for numbers in (shape, strides))
    hooks = function("collections", "OrderedDict") + b")R"
    arguments = sequence(storage(key, numel, kind, *more) + b"Q", integer(offset), shape, strides, FALSE, hooks)
    return function("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def write_zip(path, body: bytes, storages=None, byteorder=b"little", compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("archive/byteorder", byteorder)
        for key, raw in ({"0": SIX.tobytes()} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", raw)
        for name, raw in entries.items():
            archive.writestr(f"archive/{name}", raw)
    return path


def write_sequence(path, body: bytes, storages=None):
    """The older container; storages: {key: (elements, bytes)}."""
    storages = {"0": (6, SIX.tobytes())} if storages is None else storages
    keys = b"](" + b"".join(map(text, storages)) + b"e"
    raw = b"".join(struct.pack("<q", numel) + data for numel, data in storages.values())
    pickles = [EMPTY_DICT, body, keys]
    path.write_bytes(MAGIC + PROTOCOL + b"".join(b"\x80\x02" + pickle + b"." for pickle in pickles) + raw)
    return path


SIX = np.arange(6, dtype=np.float32)
WRITERS = [write_zip, write_sequence]


def refused(path) -> str:
    """The message of the refusal: one line that starts with the file's name."""
    with within(5), pytest.raises(WeightFileError) as caught:
        read_torch_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 400
    return message.removeprefix(str(path))


# --- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
def test_hand_made_file(tmp_path, write):
    body = mapping(
        image_proj=mapping(weight=tensor(), turned=tensor(shape=(3, 2), strides=(1, 3), more=[NONE])),
        ip_adapter=mapping(part=tensor(shape=(2,), strides=(2,), offset=1), scalar=tensor(shape=(), strides=())),
        step=integer(7),
        note=text("é"),
    )
    tree = read_torch_file(write(tmp_path / "a.bin", body))
    assert (tree["step"], tree["note"]) == (7, "é")
    flat = flatten(tree)
    assert list(flat) == ["image_proj.weight", "image_proj.turned", "ip_adapter.part", "ip_adapter.scalar"]
    expected = [SIX.reshape(2, 3), SIX.reshape(2, 3).T, SIX[[1, 3]], SIX[0]]
    for lazy, array in zip(flat.values(), expected, strict=True):
        read = lazy.read()
        assert lazy.shape == read.shape == array.shape and type(read) is np.ndarray
        assert lazy.dtype == read.dtype == np.float32 and read.flags.c_contiguous and read.flags.writeable
        np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("Half", np.float16),
        ("BFloat16", ml_dtypes.bfloat16),
        ("Double", np.float64),
        ("Int", np.int32),
        ("Long", np.int64),
        ("Short", np.int16),
        ("Char", np.int8),
        ("Byte", np.uint8),
    ],
)
@pytest.mark.parametrize("pad", [0, 1])  # an odd position in the file
def test_types(tmp_path, kind, dtype, pad):
    values = np.arange(6).astype(dtype)
    body = mapping(**{"x" * (1 + pad): tensor(kind=kind, strides=(1, 2))})
    path = write_sequence(tmp_path / "a.bin", body, {"0": (6, values.tobytes())})
    read = next(iter(flatten(read_torch_file(path)).values())).read()
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values.reshape(3, 2).T)


def test_bool_from_any_byte(tmp_path):
    path = write_zip(tmp_path / "a.bin", mapping(x=tensor(kind="Bool")), {"0": bytes([0, 1, 2, 255, 0, 7])})
    assert read_torch_file(path)["x"].read().tolist() == [[False, True, True], [True, False, True]]


def test_parameter_integer_keys_and_stack_global(tmp_path):
    parameter = text("torch._utils") + text("_rebuild_parameter") + b"\x93" + sequence(tensor(), FALSE, NONE) + b"R"
    path = write_zip(tmp_path / "a.bin", b"}(" + integer(0) + parameter + text("old") + EMPTY_DICT + b"u")
    tree = read_torch_file(path)
    assert isinstance(tree[0], LazyTensor) and tree["old"] == {}
    assert list(flatten(tree)) == ["0"]


def test_empty_and_expanded(tmp_path):
    body = mapping(none=tensor(shape=(0, 5), strides=(5, 1), offset=6), many=tensor(shape=(1000,), strides=(0,)))
    tree = read_torch_file(write_zip(tmp_path / "a.bin", body))
    assert tree["none"].read().shape == (0, 5)
    assert tree["many"].read().tolist() == [0.0] * 1000


@pytest.mark.parametrize("write", WRITERS)
def test_tensors_without_names(tmp_path, write):
    alone = read_torch_file(write(tmp_path / "alone.bin", tensor()))
    assert list(flatten(alone)) == [UNNAMED]
    np.testing.assert_array_equal(alone[UNNAMED].read(), SIX.reshape(2, 3))
    for body in (b"](" + tensor() + tensor(shape=(6,), strides=(1,)) + b"e", sequence(tensor(), tensor(shape=(1, 3)))):
        listed = flatten(read_torch_file(write(tmp_path / "listed.bin", body)))
        assert list(listed) == ["0", "1"] and listed["0"].shape == (2, 3)
    for body in (b"](" + tensor() + NONE + b"e", b"]" + storage("0", 6) + b"Qa", storage("0", 6) + b"Q"):
        assert "holds no dict of tensors, nor a list of them" in refused(write(tmp_path / "mixed.bin", body))


def test_flatten_takes_the_state_dict_alone(tmp_path):
    body = mapping(state_dict=mapping(**{"a.b": tensor()}), other=tensor())
    assert list(flatten(read_torch_file(write_zip(tmp_path / "a.ckpt", body)))) == ["a.b"]


WRAPPED = {
    "a model": mapping(model=mapping(**{"a.b": tensor()}), step=integer(7)),
    "deeper": mapping(model=mapping(a=mapping(b=tensor())), optimizer=mapping(state=tensor())),
    "twice": mapping(module=mapping(state_dict=mapping(**{"a.b": tensor()}))),
    "beside others": mapping(model_state_dict=mapping(**{"a.b": tensor()}), ema=tensor()),
}


@pytest.mark.parametrize("body", WRAPPED.values(), ids=WRAPPED)
def test_what_training_programs_put_around_weights(tmp_path, body):
    assert list(flatten(read_torch_file(write_zip(tmp_path / "a.pt", body)))) == ["a.b"]


def test_a_part_of_that_name_is_none(tmp_path):
    """A "model" beside the parts of an adapter, or without tensors in it, is something else."""
    for model in (mapping(width=integer(4)), mapping(c=tensor())):
        body = mapping(model=model, image_proj=mapping(b=tensor()))
        assert "image_proj.b" in flatten(read_torch_file(write_zip(tmp_path / "a.pt", body)))
    body = mapping(model=mapping(width=integer(4)), a=mapping(b=tensor()))
    assert list(flatten(read_torch_file(write_zip(tmp_path / "a.pt", body)))) == ["a.b"]


def rebuilt(function: str, *arguments: bytes) -> bytes:
    return f"ctorch._utils\n{function}\n(".encode() + b"".join(arguments) + b"tR"


OTHER_FORMS = {
    "float8_e4m3fn": rebuilt("_rebuild_tensor_v3", storage("0", 6), b"Q", b"ctorch\nfloat8_e4m3fn\n"),
    "uint16": rebuilt("_rebuild_tensor_v3", storage("0", 6), b"Q", b"ctorch\nuint16\n"),
    "a sparse tensor": rebuilt("_rebuild_sparse_tensor", NONE),
    "a quantized tensor": rebuilt("_rebuild_qtensor", b"ctorch\nQInt8Storage\n"),
    "a tensor without content": rebuilt("_rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n"),
    "an unknown form": rebuilt("_rebuild_something_new", NONE),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("write", WRITERS)
def test_tensors_of_other_forms_are_named(tmp_path, form, write):
    """They were left out in silence, and the file was said to lack them."""
    path = write(tmp_path / "a.bin", mapping(good=tensor(), bad=OTHER_FORMS[form]))
    with pytest.raises(WeightFileError, match=f"'bad' is stored as {form}.*; only .* are read, so convert the file"):
        open_tensors(path)
    beside = mapping(state_dict=mapping(good=tensor()), optimizer=mapping(bad=OTHER_FORMS[form]))
    assert list(open_tensors(write(tmp_path / "b.ckpt", beside))) == ["good"]


@pytest.mark.torch
def test_forms_that_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    plain = torch.zeros(4, 4)
    forms = {
        "float8_e4m3fn": plain.to(torch.float8_e4m3fn),
        "float8_e5m2": torch.nn.Parameter(plain.to(torch.float8_e5m2), requires_grad=False),
        "a sparse tensor": plain.to_sparse(),
        "a tensor without content": torch.empty(3, device="meta"),
    }
    for form, value in forms.items():
        for zipped in (True, False):
            torch.save({"a": value, "b": plain}, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
            with pytest.raises(WeightFileError, match=f"'a' is stored as {form}"):
                open_tensors(tmp_path / "a.bin")


def test_an_archive_of_numpy(tmp_path):
    np.savez(tmp_path / "a.npz", SIX)
    assert "is a NumPy archive (.npz) with no data.pkl; save its array alone" in refused(tmp_path / "a.npz")


def test_two_tensors_of_one_name(tmp_path):
    path = write_zip(tmp_path / "a.bin", mapping(**{"a.b": tensor(), "a": mapping(b=tensor())}))
    assert "has two tensors 'b'" in refused(path)
    path = write_zip(tmp_path / "b.bin", b"}(" + integer(1) + tensor() + text("1") + tensor() + b"u")
    assert "has two tensors '1'" in refused(path)


def test_file_that_shrank(tmp_path):
    path = write_zip(tmp_path / "a.bin", mapping(x=tensor()))
    lazy = read_torch_file(path)["x"]
    path.write_bytes(b"")
    with pytest.raises(WeightFileError, match=r"a\.bin: has changed"):
        lazy.read()
    path.unlink()
    with pytest.raises(WeightFileError, match=r"a\.bin: has changed"):
        lazy.read()


# --- against PyTorch ---------------------------------------------------------------------------------------------


class Callback:
    """Stands for the classes in a checkpoint of PyTorch Lightning."""

    def __init__(self):
        self.best = "x"


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_equal_to_torch(tmp_path, zipped, protocol):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    shared = torch.randn(4, 6)
    tree = {
        "image_proj": {
            "float": shared,
            "half": torch.randn(3, 5).half(),
            "bfloat16": torch.randn(3, 5).bfloat16().T,
            "long": torch.arange(10) - 5,
            "bool": torch.tensor([True, False]),
            "complex": torch.randn(3, dtype=torch.complex64),
            "shared": shared[1:, 2::2],
            "parameter": torch.nn.Parameter(torch.randn(2, 2)),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(3.5),
            "expanded": torch.ones(1, 3).expand(4, 3),
        },
        "ip_adapter": torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict(),
        "step": 3,
    }
    tree["image_proj"]["bfloat16"].requires_grad_()
    path = tmp_path / "a.bin"
    torch.save(tree, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    flat = flatten(read_torch_file(path))
    peers = {f"{part}.{key}": value for part in ("image_proj", "ip_adapter") for key, value in tree[part].items()}
    assert list(flat) == list(peers)
    for key, peer in peers.items():
        read = flat[key].read()
        assert str(read.dtype) == str(peer.dtype).removeprefix("torch.") and read.shape == tuple(peer.shape), key
        if peer.dtype == torch.bfloat16:
            read, peer = read.view(np.int16), peer.detach().contiguous().view(torch.int16)
        np.testing.assert_array_equal(read, peer.detach().numpy())


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_with_unknown_classes(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    checkpoint = {
        "state_dict": collections.OrderedDict({"model.weight": torch.eye(3)}),
        "callbacks": {Callback: Callback(), "x": Callback()},
        "hyper_parameters": argparse.Namespace(lr=1e-4, path=Path("x")),
        "counts": collections.defaultdict(int, a=1),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "storage": torch.ones(3).untyped_storage(),
        "unsigned": torch.ones(3, dtype=torch.uint16),
        "kinds": {1, 2},
        "epoch": 5,
    }
    torch.save(checkpoint, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    tree = read_torch_file(tmp_path / "a.ckpt")
    np.testing.assert_array_equal(flatten(tree)["model.weight"].read(), np.eye(3))
    assert tree["epoch"] == 5 and tree["callbacks"] == {"x": OPAQUE}
    assert all(tree[key] is OPAQUE for key in ("hyper_parameters", "counts", "size", "dtype", "unsigned", "kinds"))


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "call",
    [
        function("os", "system") + sequence(text("touch MARK")) + b"R",
        function("posix", "system") + sequence(text("touch MARK")) + b"R",
        text("os") + text("system") + b"\x93" + sequence(text("touch MARK")) + b"R",
        b"(" + text("touch MARK") + b"ios\nsystem\n",
        b"(" + function("os", "system") + text("touch MARK") + b"o",
        function("os", "system") + sequence(text("touch MARK")) + b"\x81",
        function("os", "system") + sequence(text("touch MARK")) + b"}\x92",
        function("importlib", "import_module") + sequence(text("antigravity")) + b"R",
        function("builtins", "eval") + sequence(text("open('MARK', 'w')")) + b"R",
        function("builtins", "getattr") + sequence(function("os", "path"), text("os")) + b"R}b",
    ],
)
def test_nothing_is_executed(tmp_path, monkeypatch, write, call):
    def executed(*_):
        raise AssertionError("the file had its way")

    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.bin", mapping(x=call, y=tensor()))
    monkeypatch.setattr(os, "system", executed)
    monkeypatch.setattr(importlib, "import_module", executed)
    tree = read_torch_file(path)
    monkeypatch.undo()
    assert tree["x"] is OPAQUE and isinstance(tree["y"], LazyTensor)  # the weights are read all the same
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("module", [pickle_interpreter, torch_pickle])
def test_reader_has_no_means_to_execute(module):
    source = ast.parse(Path(module.__file__).read_text())
    names = {node.id for node in ast.walk(source) if isinstance(node, ast.Name)}
    imports = [node.names for node in ast.walk(source) if isinstance(node, ast.Import)]
    imports = {alias.name for names in imports for alias in names}
    assert not names & {"eval", "exec", "getattr", "setattr", "__import__", "Unpickler", "globals", "compile"}
    assert not imports & {"pickle", "importlib", "torch", "subprocess"}


TENSOR_PROBLEMS = {
    "reaches outside": [tensor(shape=(7,), strides=(1,)), tensor(offset=1), tensor(strides=(4, 1))]
    + [tensor(shape=(), strides=(), offset=6), tensor(shape=(0,), strides=(1,), offset=7)]
    + [tensor(shape=(2**62,) * 3, strides=(1, 1, 1)), tensor(shape=(2, 2), strides=(2**62, 2**62))],
    "larger than the file": [tensor(shape=(2**40,), strides=(0,)), tensor(shape=(0, 2**40), strides=(1, 1))],
    "wrong shape, stride or offset": [tensor(shape=(-1, 3)), tensor(strides=(-3, 1)), tensor(offset=-1)]
    + [tensor(offset=2**70), tensor(shape=(1,) * 33, strides=(1,) * 33), tensor(shape=(2,), strides=(1, 1))],
    "another size than it says": [tensor(numel=7), tensor(kind="Half"), tensor(numel=2**61)],
    "unknown form": [tensor(numel=2**70), tensor(numel=-1), tensor(more=[sequence(text("1"), integer(0))])],
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("problem", TENSOR_PROBLEMS)
def test_wrong_tensors(tmp_path, write, problem):
    for number, body in enumerate(TENSOR_PROBLEMS[problem]):
        if write is write_sequence and body == tensor(kind="Half"):
            continue  # the older container does not say the bytes of a storage
        assert problem in refused(write(tmp_path / f"{number}.bin", mapping(x=body))), number


def test_two_views_of_the_storage_disagree(tmp_path):
    body = mapping(x=tensor(), y=tensor(kind="Int"))
    assert "two storages of the name '0'" in refused(write_zip(tmp_path / "a.bin", body))


def test_unknown_global_in_a_tensor(tmp_path):
    body = mapping(x=tensor(kind="Quantized"), y=tensor())
    assert read_torch_file(write_zip(tmp_path / "a.bin", body))["x"] is OPAQUE
    path = write_sequence(tmp_path / "b.bin", mapping(x=tensor(kind="Quantized")))  # the bytes cannot be skipped
    assert "storages of an unknown type" in refused(path)


NESTED = b"}" + (text("x") + b"}") * 100 + b"s" * 100
LOOP = b"}q\0(" + text("x") + b"h\0u"
SHARED = b"}q\0" + b"".join(
    b"0}q" + bytes([n + 1]) + b"(" + text("a") + b"h%c" % n + text("b") + b"h%cu" % n for n in range(60)
)
BODIES = {
    "nested too deep": [NESTED, LOOP],
    "has too many entries": [SHARED],
    "too many pickle opcodes": [b"]" + b"]0" * 30_000, b"(" * 50_001],
    "holds no dict": [b"]", b"]" * 20_000 + b"a" * 19_999, b")" + b"\x85" * 40_000, b"]q\0h\0a"],
    "damaged or cut short near byte": [
        b"",
        b"s",
        b"0",
        b"h\7",
        b"a",
        b"t",
        b"}(Nu",
        b"\x8e" + struct.pack("<Q", 2**62),
        b"\x8b" + struct.pack("<I", 2**31 - 1),
        b"X" + struct.pack("<I", 2**32 - 1),
        b"I" + b"1" * 10_000 + b"\n",
        b"Ix\n",
        b"V\\u12\n",
        b"S'a\n",
        b"\xff",
    ],
    "pickle opcode PERSID": [b"Pstorage\n"],
    "pickle opcode EXT1": [b"\x82\1"],
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("problem", BODIES)
def test_wrong_pickles(tmp_path, monkeypatch, write, problem):
    monkeypatch.setattr(pickle_interpreter, "_MAX_OPCODES", 50_000)  # for the time that the tests take
    for number, body in enumerate(BODIES[problem]):
        assert problem in refused(write(tmp_path / f"{number}.bin", body, {})), number


def test_deepest_nesting_within_the_limits(tmp_path):
    """Neither recursion nor much time, however deep the tuples or lists are."""
    assert "holds no dict" in refused(write_zip(tmp_path / "a.bin", b")" + b"\x85" * 999_000, {}))
    assert "too many pickle opcodes" in refused(write_zip(tmp_path / "b.bin", b"]" * 600_000 + b"a" * 599_999, {}))


def test_work_is_bounded(tmp_path):
    """A large value from the memo, used a hundred thousand times, must not be copied, hashed or looked through."""
    big = text("é" * 1_000_000) + b"q\0"
    wide = b"(" + b"N" * 100_000 + b"tq\1"
    pairs = b"\x85q\2" * 30  # a tuple in a tuple in a tuple
    doubled = b")" + b"q\3h\3\x86" * 100  # (t, t) and so on: 2^100 leaves
    prepare = b"".join(part + b"0" for part in (big, wide, b")" + pairs, doubled + b"q\3"))
    uses = [
        b"h\0h\0\x930",
        b"(" + b"h\0N" + b"d0",
        b"}h\1Ns0",
        b"}h\3Ns0",
        function("collections", "OrderedDict") + b"h\1R0",
        function("torch._utils", "_rebuild_tensor_v2") + b"h\1R0",
        b"h\1Q0",
        b"h\3Q0",
        b"]q\4h\1a0",
        b"h\3h\1R0",
        b"h\3h\3\x810",
    ]
    for use in uses:
        path = write_zip(tmp_path / "a.bin", prepare + use * 5_000 + b"}")
        with within(5):
            assert read_torch_file(path) == {}, use


def test_wrong_zips(tmp_path):
    path, body = tmp_path / "a.bin", mapping(x=tensor())
    assert "compressed" in refused(write_zip(path, body, compression=zipfile.ZIP_DEFLATED))
    assert "little-endian" in refused(write_zip(path, body, byteorder=b"big"))
    assert "lacks its entry 'archive/data/0'" in refused(write_zip(path, body, {}))
    assert "another size" in refused(write_zip(path, body, {"0": bytes(23)}))
    assert "TorchScript" in refused(write_zip(path, body, **{"constants.pkl": b""}))
    np.savez(tmp_path / "a.npz", x=SIX)
    assert "no data.pkl" in refused(tmp_path / "a.npz")
    whole = write_zip(path, body).read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path)


def test_overlapping_zip_entries(tmp_path):
    """Many entries with the same bytes: each fits the file, together they are far larger."""
    raw = {str(n): bytes([n]) * 24 for n in range(200)}
    path = write_zip(tmp_path / "a.bin", mapping(**{key: tensor(key) for key in raw}), raw)
    assert len(flatten(read_torch_file(path))) == 200
    raw = {str(n): bytes(240_000 if n == 0 else 24) for n in range(9)}
    path = write_zip(path, mapping(**{key: tensor(key, numel=60_000) for key in raw}), raw)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        first = archive.getinfo("archive/data/0")
    at = data.index(b"PK\1\2")
    while data[at : at + 4] == b"PK\1\2":
        length = struct.unpack_from("<H", data, at + 28)[0]
        if data[at + 46 : at + 46 + length].startswith(b"archive/data/"):
            struct.pack_into("<II", data, at + 20, 240_000, 240_000)
            struct.pack_into("<I", data, at + 42, first.header_offset)
        at += 46 + length
    path.write_bytes(data)
    assert "another size" in refused(path)


def test_huge_zip_directory(tmp_path):
    path = tmp_path / "a.bin"
    directory = bytes(5_000_000)
    end = struct.pack("<4s4xHHIIH", b"PK\5\6", 9, 9, len(directory), 4, 0)
    path.write_bytes(b"PK\3\4" + directory + end)
    assert "far too large zip directory" in refused(path)


def test_wrong_sequences(tmp_path):
    path, body = tmp_path / "a.bin", mapping(x=tensor())
    assert "another size" in refused(write_sequence(path, body, {"0": (5, SIX.tobytes())}))
    assert "another size" in refused(write_sequence(path, body, {"0": (-1, SIX.tobytes())}))
    assert "lacks some" in refused(write_sequence(path, body, {}))
    assert "unknown type" in refused(write_sequence(path, body, {"0": (6, SIX.tobytes()), "1": (0, b"")}))
    whole = write_sequence(path, body).read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(b"\x80\x04N.")
    assert "not one of torch.save" in refused(path)


def test_other_files_are_named(tmp_path):
    path = tmp_path / "a.bin"
    for head in (b"", b"hello", b"\n<!DOCTYPE html><html>"):
        path.write_bytes(head)
        assert "is not a file of torch.save" in refused(path)
    assert "no such file" in refused(tmp_path / "missing.bin")
    assert "no such file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "no such file" in refused(tmp_path / "pipe")


# --- fuzzing -----------------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(6):
            case 0 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                raw[at : at + 1] = bytes([rng.choice(b"\0\1\2()]}tsueaRQ012\x81\x85\x86\x87\x93\xff" + data)])
            case 2:
                raw[at : at + rng.randrange(9)] = b""
            case 3:
                start = rng.randrange(len(data))
                raw[at:at] = data[start : start + rng.randrange(40)] * rng.choice([1, 1, 3])
            case 4:
                raw[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4), b"\0\0\0\x80"])
            case 5 if rng.random() < 0.2:
                raw = raw[: at + 1]
    return bytes(raw)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_files(tmp_path, seed):
    rng = random.Random(seed)
    path = tmp_path / "a.bin"
    weights = mapping(a=tensor(), b=tensor("1", kind="Half", more=[NONE]), c=function("x", "Y") + b")\x81}b")
    body = mapping(state_dict=weights, n=integer(3), x=b"](K\1K\2e", loop=b"}q\1h\1\x850")
    whole_zip = write_zip(path, body, {"0": bytes(24), "1": bytes(12)}).read_bytes()
    whole_sequence = write_sequence(path, body, {"0": (6, bytes(24)), "1": (6, bytes(12))}).read_bytes()
    read = 0
    for number in range(1000):
        match number % 3:
            case 0:  # a sound zip, so that the damage reaches the machine
                write_zip(path, mutated(body, rng), {"0": bytes(24), "1": bytes(12)})
            case 1:
                path.write_bytes(mutated(whole_zip, rng))
            case 2:
                path.write_bytes(mutated(whole_sequence, rng))
        with within(2):
            try:
                for lazy in flatten(read_torch_file(path)).values():
                    lazy.read()
                read += 1
            except WeightFileError as error:
                assert "\n" not in str(error) and str(path) in str(error)
    assert 50 < read < 950  # neither too gentle nor too rough
