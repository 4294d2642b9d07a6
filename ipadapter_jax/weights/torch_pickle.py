"""Reads the files of `torch.save`, zip or the older sequence of pickles, without PyTorch and without unpickling.

A pickle is a program, and the usual reader runs whatever function it names. Here its opcodes drive a small machine that
builds dicts, lists, tuples and descriptions of tensors, nothing else. What it does not know, such as the callbacks in a
checkpoint of PyTorch Lightning, becomes OPAQUE and is never imported.
"""

import io
import math
import os
import pickletools
import struct
import zipfile
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


def _require(condition: object, problem: str, remedy: str = _AGAIN) -> None:
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
        """The elements in C order; nothing else is read. Raises WeightFileError if the file has gone or shrunk."""
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
    """Read a `.bin`, `.pt` or `.ckpt` file: nested dicts with LazyTensor leaves, without loops.

    Keys are strings or integers; entries under other keys are left out. Numbers, strings and None stay as they are,
    everything else, lists included, becomes OPAQUE. Raises WeightFileError naming the file when it is none of
    torch.save, damaged, hostile, or of a kind that is not supported.
    """
    try:
        _require(os.path.isfile(path), "there is no such file", "; check the path")  # nor a pipe, which would block
        with _File(path) as file:
            head = file.read_at(0, min(file.size, 512))
            _require(head.startswith((b"PK\3\4", b"\x80")), *_other_kind(head, file.size))
            tree = _read_zip(file) if head.startswith(b"PK") else _read_sequence(file)
        _require(type(tree) is dict, "holds no dict of tensors", _SAVE)
        flatten({"": tree})  # refuses loops and the like here, where the name of the file is known
        return tree
    except (_Refused, OSError) as error:
        raise WeightFileError(f"{path}: {error}") from None


def flatten(tree: dict) -> dict[str, LazyTensor]:
    """Join the names in a tree of `read_torch_file` with dots; only tensors are kept, of any "state_dict" alone."""
    inner = tree.get("state_dict")
    pending = [("", 0, inner if isinstance(inner, dict) else tree)]
    named, cost = {}, 0
    for prefix, depth, branch in pending:  # which grows on the way
        for key, value in branch.items():
            name = f"{prefix}{key}"
            cost += 64 + len(name)
            _require(cost <= _MAX_NAMES and depth <= _MAX_DEPTH, "has too many entries, or nested too deep", _SAVE)
            if isinstance(value, dict):
                pending.append((f"{name}.", depth + 1, value))
            elif isinstance(value, LazyTensor):
                _require(named.setdefault(name, value) is value, f"has two tensors {str(key)[:60]!r}", _SAVE)
    return named


class _Machine:
    """Follows the pickles of a file and notes their storages.

    Values are shared, never copied, hashed or compared in depth: an opcode costs no more than the bytes it brings.
    """

    def __init__(self, file: "_File"):
        self.file, self.opcodes = file, 0
        self.storages: dict[str, _Storage] = {}

    def run(self, stream: io.BytesIO) -> Any:
        """Follow one pickle and return what it describes."""
        stack, outer, memo = [], [], {}  # outer: the stacks below the marks
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self.opcodes += 1
                _require(self.opcodes <= _MAX_OPCODES, "has too many pickle opcodes", _SAVE)
                name, needs, items = opcode.name, opcode.stack_before, []
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
                return None if name == "NONE" else name == "NEWTRUE"
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(below or items)
            case "EMPTY_LIST" | "LIST" | "APPEND" | "APPENDS":
                target, *rest = below or [[]]
                if type(target) is list:
                    target.extend(rest or items)
                return target
            case "EMPTY_DICT" | "DICT" | "SETITEM" | "SETITEMS":
                target, *rest = below or [{}]
                for key, value in zip((rest or items)[::2], (rest or items)[1::2], strict=True):
                    short = type(key) is str and len(key) <= _MAX_NAME
                    is_name = key.isprintable() if short else _is_size(key)  # hashing anything else may never end
                    if is_name and type(target) is dict:
                        plain = value is None or type(value) in (bool, int, float, str, bytes, dict, LazyTensor)
                        target[key] = value if plain else OPAQUE
                return target
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
        known = type(identity) is tuple and 5 <= len(identity) <= 6 and identity[0] == "storage"
        if not known or not isinstance(identity[1], np.dtype):
            return OPAQUE
        _, dtype, key, _, numel, *view = identity
        proper = type(key) is str and _is_size(numel) and view in ([], [None])
        _require(proper, "has a storage of unknown form", _SAVE)
        storage = self.storages.setdefault(key, _Storage(self.file.path, dtype, numel))
        _require((storage.dtype, storage.numel) == (dtype, numel), f"has two storages of the name {key[:60]!r}")
        return storage

    def _tensor(self, storage: _Storage, offset: Any, shape: Any, strides: Any) -> LazyTensor:
        proper = type(shape) is tuple and type(strides) is tuple and len(shape) == len(strides) <= _MAX_DIMENSIONS
        proper = proper and all(_is_size(number) for number in (offset, *shape, *strides))
        _require(proper, "has a tensor with a wrong shape, stride or offset")
        # The stride of a single element is never used and may be any number.
        size = storage.dtype.itemsize
        strides = tuple(stride * size if length > 1 else 0 for length, stride in zip(shape, strides, strict=True))
        span = 0 if 0 in shape else size + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        _require(offset * size + span <= storage.numel * size, "has a tensor that reaches outside its storage")
        fits = math.prod(length or 1 for length in shape) * size <= max(self.file.size, _EXPANDED)
        _require(fits, "has a tensor that is larger than the file itself", _SAVE)
        return LazyTensor(shape, storage.dtype, storage, offset * size, strides, span)


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
        _require(length <= _MAX_PICKLE, "has a far too large pickle", _SAVE)
        self.seek(position)
        return super().read(length)


def _read_sequence(file: _File) -> Any:
    """Read the older container and locate its storages."""
    machine, stream = _Machine(file), io.BytesIO(file.read_at(0, min(file.size, _MAX_PICKLE)))
    for known in (_MAGIC, _PROTOCOL):
        _require(machine.run(stream) == known, "is a pickle, but not one of torch.save", _SAVE)
    machine.run(stream)  # describes the computer; the storages are little-endian on all of them
    tree, keys = machine.run(stream), machine.run(stream)
    proper = type(keys) is list and all(type(key) is str for key in keys) and set(keys) == set(machine.storages)
    _require(proper, "has storages of an unknown type, or lacks some", _SAVE)
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
        _require(name in entries, f"lacks its entry {name[:60]!r}")
        entry = entries[name]
        header, length = file.read_at(entry.header_offset, 30), entry.file_size
        start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        sound = header.startswith(b"PK\3\4") and entry.compress_size == length and start + length <= file.size
        _require(stored and sound, f"has a compressed, encrypted or damaged entry {name[:60]!r}", _SAVE)
        return start, length

    folder = next((name[:-8] for name in entries if name.endswith("/data.pkl") and name.count("/") == 1), "")
    weights = folder and f"{folder}constants.pkl" not in entries
    _require(weights, "is a zip file, but not one of weights: no data.pkl, or a TorchScript program", _SAVE)
    if f"{folder}byteorder" in entries:
        _require(file.read_at(*locate(f"{folder}byteorder")) == b"little", "is not little-endian", _SAVE)
    machine, total = _Machine(file), 0
    tree = machine.run(io.BytesIO(file.read_at(*locate(f"{folder}data.pkl"))))
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
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not weights", "; download the file itself (often /resolve/ instead of /blob/)"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "is a safetensors file", "; give it the ending .safetensors"
    return "is no file of torch.save" if head else "is empty", _AGAIN


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
