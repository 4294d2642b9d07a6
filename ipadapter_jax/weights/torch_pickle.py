"""Reads the files of `torch.save` without PyTorch and without unpickling.

A pickle is a program, and the usual reader runs whatever function it names. Here its opcodes drive a small machine that
builds dicts, lists, tuples and descriptions of tensors, nothing else. What it does not know, such as the callbacks in a
checkpoint of PyTorch Lightning, becomes OPAQUE and is never imported. Both containers are read: zip (since PyTorch 1.6)
and the older sequence of pickles, after which each storage follows as element count and raw little-endian bytes.
"""

import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ipadapter_jax.errors import WeightFileError

# Far above any real checkpoint, and low enough that a hostile file costs neither minutes nor gigabytes.
_MAX_PICKLE, _MAX_DIRECTORY, _MAX_OPCODES = 1 << 24, 1 << 22, 1_000_000  # the first two in bytes
_MAX_DEPTH, _MAX_NAME, _MAX_DIMENSIONS = 64, 1000, 32
_MAX_NAMES = 1 << 24  # characters of all full names, and 64 for each entry: n dicts that share can spell 2^n names
_EXPANDED = 1 << 20  # bytes that a tensor with repeated elements may have, however small its file
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the older container
_AGAIN = "; copy or download the file again"
_SAVE = "; load it with PyTorch and save its state dict as safetensors"

OPAQUE = type("Opaque", (), {})()  # whatever is neither a tensor nor a dict, a number, a string or None
_TENSOR, _PARAMETER, _ORDERED_DICT = object(), object(), object()  # the functions that the machine knows
_DTYPES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": ml_dtypes.bfloat16, "Bool": "?", "Byte": "u1"}
_DTYPES |= {"Char": "i1", "Short": "i2", "Int": "i4", "Long": "i8", "ComplexFloat": "c8", "ComplexDouble": "c16"}
_GLOBALS: dict[tuple, Any] = {("torch", f"{name}Storage"): np.dtype(dtype) for name, dtype in _DTYPES.items()} | {
    ("torch.storage", "UntypedStorage"): np.dtype("u1"),
    ("torch._utils", "_rebuild_tensor_v2"): _TENSOR,
    ("torch._utils", "_rebuild_parameter"): _PARAMETER,
    ("collections", "OrderedDict"): _ORDERED_DICT,
}
_LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING"} | {
    *("BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


class _Refused(Exception):
    """What is wrong, and the remedy; `read_torch_file` puts the file's name before it."""


def _require(condition: bool, problem: str, remedy: str = _AGAIN) -> None:
    if not condition:
        raise _Refused(problem + remedy)


@dataclass(eq=False)
class _Storage:
    path: str
    dtype: np.dtype
    numel: int
    position: int = -1  # in the file; the older container tells it only after the pickle


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that still lies in its file; the last three count bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    storage: _Storage
    offset: int
    strides: tuple[int, ...]
    span: int  # from the first element to the end of the last one

    def read(self) -> np.ndarray:
        """Read the elements in C order, without touching the rest of the file.

        Raises:
            WeightFileError: the file has gone or shrunk since it was opened.
        """
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        path, position = self.storage.path, self.storage.position + self.offset
        try:
            raw = np.memmap(path, np.uint8, "r", position, (self.span,))
        except (OSError, ValueError):
            raise WeightFileError(f"{path}: has changed since it was opened{_AGAIN}") from None
        view = np.ndarray(self.shape, self.dtype, raw, 0, self.strides)
        if self.dtype == np.bool_:  # a bool of NumPy must be 0 or 1, which a file cannot promise
            view = view.view(np.uint8) != 0
        return np.array(view, order="C")


def read_torch_file(path: str | os.PathLike[str]) -> dict:
    """Read a `.bin`, `.pt` or `.ckpt` file: nested dicts with LazyTensor leaves.

    Keys are strings or integers; entries under other keys are left out. Numbers, strings and None stay as they are,
    everything else, lists included, becomes OPAQUE.

    Raises:
        WeightFileError: not a file of torch.save, damaged, hostile, or of a kind that is not supported.
    """
    try:
        _require(os.path.isfile(path), "there is no such file", "; check the path")  # nor a pipe, which would block
        with _File(path) as file:
            head = file.read_at(0, min(file.size, 512))
            _require(head.startswith((b"PK\3\4", b"\x80")), *_other_kind(head, file.size))
            tree = _read_zip(file) if head.startswith(b"PK") else _read_sequence(file)
        _require(type(tree) is dict, "holds no dict of tensors", _SAVE)
        return _plain_tree(tree)
    except _Refused as error:
        raise WeightFileError(f"{path}: {error}") from None
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read: {error.strerror}; check the file") from None


def flatten(tree: dict) -> dict[str, LazyTensor]:
    """Join the names of nested dicts with dots; only tensors are kept, and of "state_dict" alone where there is one.

    Raises:
        WeightFileError: two tensors have the same name.
    """
    inner = tree.get("state_dict")
    named = list(_named_tensors(inner if isinstance(inner, dict) else tree, ""))
    flat = dict(named)
    if len(flat) < len(named):
        raise WeightFileError(f"{named[0][1].storage.path}: has two tensors of one name{_SAVE}")
    return flat


def _named_tensors(tree: dict, prefix: str) -> Iterator[tuple[str, LazyTensor]]:
    for key, value in tree.items():
        if isinstance(value, LazyTensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _named_tensors(value, f"{prefix}{key}.")


def _plain_tree(root: dict) -> dict:
    """Copy what has names, so that the result holds no cycles and nothing but plain values and tensors."""
    result: dict = {}
    pending = [(root, result, 0, 0)]
    cost = 0
    while pending:
        source, target, depth, prefix = pending.pop()
        for key, value in source.items():
            length = prefix + len(str(key)) + 1
            cost += 64 + length
            _require(cost <= _MAX_NAMES and depth <= _MAX_DEPTH, "has too many entries, or nested too deep", _SAVE)
            plain = value is None or type(value) in (bool, float, str, bytes, LazyTensor) or _is_int(value)
            target[key] = {} if type(value) is dict else value if plain else OPAQUE
            if type(value) is dict:
                pending.append((value, target[key], depth + 1, length))
    return result


class _Machine:
    """Follows the pickles of a file and notes their storages.

    An opcode costs constant time and memory besides the bytes that it brings along: values are shared, and never
    copied, hashed or compared in depth, so that a small file cannot ask for a lot of work.
    """

    def __init__(self, path: str, size: int):
        self.path = path
        self.largest = max(size, _EXPANDED)  # bytes of a tensor
        self.storages: dict[str, _Storage] = {}
        self.opcodes = 0

    def run(self, stream: io.BytesIO) -> Any:
        """Follow one pickle and return what it describes; raises _Refused."""
        stack: list[Any] = []
        outer: list[list[Any]] = []  # the stacks below the marks
        memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self.opcodes += 1
                _require(self.opcodes <= _MAX_OPCODES, "has too many pickle opcodes", _SAVE)
                name, needs = opcode.name, opcode.stack_before
                if name in _LITERALS:
                    stack.append(argument)
                elif name in ("BINGET", "LONG_BINGET", "GET"):
                    stack.append(memo[argument])
                elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                    memo[len(memo) if argument is None else argument] = stack[-1]
                elif name == "MARK":
                    outer.append(stack)
                    stack = []
                elif name not in ("PROTO", "FRAME", "STOP"):
                    items: list[Any] = []
                    if pickletools.markobject in needs:  # takes all above the mark, and what it needs below
                        needs = needs[: needs.index(pickletools.markobject)]
                        items, stack = stack, outer.pop()
                    below = [stack.pop() for _ in needs]
                    if name not in ("POP", "POP_MARK"):
                        stack.append(self._result(name, argument, below[::-1], items))
            return stack.pop()
        except (ValueError, IndexError, KeyError):  # a malformed opcode, an empty stack, an unknown place in the memo
            raise _Refused(f"is damaged or cut short near byte {stream.tell()} of its pickle{_AGAIN}") from None

    def _result(self, name: str, argument: Any, below: list[Any], items: list[Any]) -> Any:
        match name:
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                return {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name]
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(below or items)
            case "EMPTY_LIST" | "LIST" | "APPEND" | "APPENDS":
                target, *rest = below or [[]]
                if type(target) is list:
                    target.extend(rest or items)
                return target
            case "EMPTY_DICT" | "DICT" | "SETITEM" | "SETITEMS":
                target, *rest = below or [{}]
                return self._set_items(target, rest or items)
            case "GLOBAL" | "STACK_GLOBAL":
                names = below or argument.split(" ", 1)
                return _GLOBALS.get(tuple(names), OPAQUE) if all(type(name) is str for name in names) else OPAQUE
            case "REDUCE" | "NEWOBJ":
                return self._call(*below)
            case "BINPERSID":
                return self._storage(*below)
            case "BUILD":  # would set the state of an object
                return below[0]
            case "INST" | "OBJ" | "NEWOBJ_EX" | "EMPTY_SET" | "ADDITEMS" | "FROZENSET":
                return OPAQUE
        raise _Refused(f"uses the pickle opcode {name}, which no weights need{_SAVE}")

    def _set_items(self, target: Any, items: list[Any]) -> Any:
        """Set the items that have names; to hash any other key, such as a tuple of tuples, may take forever."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            is_name = len(key) <= _MAX_NAME and key.isprintable() if type(key) is str else _is_int(key)
            if type(target) is dict and is_name:
                target[key] = value
        return target

    def _call(self, function: Any, arguments: Any) -> Any:
        count = len(arguments) if type(arguments) is tuple else -1
        if function is _ORDERED_DICT and count == 0:
            return {}
        if function is _PARAMETER and count == 3:
            return arguments[0]
        if function is _TENSOR and 6 <= count <= 7 and type(arguments[0]) is _Storage:
            return self._tensor(*arguments[:4])
        return OPAQUE

    def _storage(self, identity: Any) -> Any:
        """Note ("storage", type, key, device, numel); the older container appends a None: it is no view of another."""
        if type(identity) is not tuple or not 5 <= len(identity) <= 6 or identity[0] != "storage":
            return OPAQUE
        _, dtype, key, _, numel, *view = identity
        if not isinstance(dtype, np.dtype):
            return OPAQUE
        _require(
            type(key) is str and _is_int(numel, 0) and view in ([], [None]), "has a storage of unknown form", _SAVE
        )
        storage = self.storages.setdefault(key, _Storage(self.path, dtype, numel))
        _require((storage.dtype, storage.numel) == (dtype, numel), f"has two storages of the name {key[:60]!r}")
        return storage

    def _tensor(self, storage: _Storage, offset: Any, shape: Any, strides: Any) -> LazyTensor:
        proper = type(shape) is tuple and type(strides) is tuple and len(shape) == len(strides) <= _MAX_DIMENSIONS
        proper = proper and all(_is_int(number, 0) for number in (offset, *shape, *strides))
        _require(proper, "has a tensor with a wrong shape, stride or offset")
        # The stride of a single element is never used and may be any number.
        strides = [stride if length > 1 else 0 for length, stride in zip(shape, strides, strict=True)]
        span = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        span = 0 if 0 in shape else span
        _require(offset + span <= storage.numel, "has a tensor that reaches outside its storage")
        itemsize = storage.dtype.itemsize
        size = math.prod(length or 1 for length in shape) * itemsize
        _require(size <= self.largest, "has a tensor that is larger than the file itself", _SAVE)
        strides = tuple(stride * itemsize for stride in strides)
        return LazyTensor(shape, storage.dtype, storage, offset * itemsize, strides, span * itemsize)


class _File(io.FileIO):
    """Reads no more than there is, so that nothing is allocated on the word of a hostile file."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path, "rb")
        self.path, self.size = os.fspath(path), os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Read for `zipfile`, whose time and memory grow with the directory that it reads."""
        size = self.size - self.tell() if size is None or size < 0 else size
        _require(0 <= size <= _MAX_DIRECTORY, "has a damaged or far too large zip directory")
        return super().read(size)

    def read_at(self, position: int, length: int) -> bytes:
        _require(0 <= position <= position + length <= self.size, f"is cut short or damaged: has {self.size} bytes")
        self.seek(position)
        return super().read(length)


def _read_sequence(file: _File) -> Any:
    """Read the older container and locate its storages."""
    stream = io.BytesIO(file.read_at(0, min(file.size, _MAX_PICKLE)))
    machine = _Machine(file.path, file.size)
    known = machine.run(stream) == _MAGIC and machine.run(stream) == _PROTOCOL
    _require(known, "is a pickle, but not one of torch.save", _SAVE)
    machine.run(stream)  # describes the computer; the storages are little-endian on all of them
    tree, keys = machine.run(stream), machine.run(stream)
    known = type(keys) is list and all(type(key) is str and key in machine.storages for key in keys)
    _require(known and set(keys) == set(machine.storages), "has storages of an unknown type, or lacks some", _SAVE)
    end = stream.tell()
    for key in keys:
        storage = machine.storages[key]
        same = struct.unpack("<q", file.read_at(end, 8)) == (storage.numel,)
        _require(same, f"has a storage {key[:60]!r} of another size than it says")
        storage.position = end + 8
        end += 8 + storage.numel * storage.dtype.itemsize
    file.read_at(end, 0)
    return tree


def _read_zip(file: _File) -> Any:
    """Read the zip container and locate its storages."""
    try:
        listed = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error):
        raise _Refused(f"is cut short or damaged: it starts as a zip file, but ends otherwise{_AGAIN}") from None
    entries = {entry.filename: entry for entry in listed}
    _require(len(entries) == len(listed), "has two zip entries of one name")

    def locate(name: str) -> tuple[int, int]:
        entry = entries.get(name)
        if entry is None:
            raise _Refused(f"lacks its entry {name[:60]!r}{_AGAIN}")
        stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        _require(stored, f"has a compressed or encrypted entry {name[:60]!r}", _SAVE)
        header = file.read_at(entry.header_offset, 30)
        start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        sound = header.startswith(b"PK\3\4") and entry.compress_size == entry.file_size
        _require(sound and start + entry.file_size <= file.size, f"has a damaged entry {name[:60]!r}")
        return start, entry.file_size

    folder = next((name[:-8] for name in entries if name.endswith("/data.pkl") and name.count("/") == 1), "")
    weights = folder and f"{folder}constants.pkl" not in entries
    _require(bool(weights), "is a zip file, but not one of weights: no data.pkl, or a TorchScript program", _SAVE)
    if f"{folder}byteorder" in entries:
        position, length = locate(f"{folder}byteorder")
        _require(file.read_at(position, min(length, 16)) == b"little", "is not little-endian", _SAVE)
    position, length = locate(f"{folder}data.pkl")
    _require(length <= _MAX_PICKLE, "has a far too large pickle", _SAVE)
    machine, total = _Machine(file.path, file.size), 0
    tree = machine.run(io.BytesIO(file.read_at(position, length)))
    for key, storage in machine.storages.items():
        storage.position, length = locate(f"{folder}data/{key}")
        total += length  # the entries of a bomb overlap
        same = length == storage.numel * storage.dtype.itemsize and total <= file.size
        _require(same, f"has a storage {key[:60]!r} of another size than it says")
    return tree


def _other_kind(head: bytes, size: int) -> tuple[str, str]:
    """Say what a file is that is neither container of torch.save, and what to do."""
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights", "; fetch them with `git lfs pull`"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not weights", "; download the file itself (often /resolve/ instead of /blob/)"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "is a safetensors file", "; give it the ending .safetensors"
    return "is no file of torch.save" if head else "is empty", _AGAIN


def _is_int(value: object, least: int = -(2**63)) -> bool:
    return type(value) is int and least <= value < 2**63
