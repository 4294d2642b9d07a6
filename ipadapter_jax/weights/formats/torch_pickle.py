"""Reads the files of `torch.save`, zip or the older sequence of pickles, without PyTorch and without unpickling.

This module reads the containers: where the pickles and the bytes of the tensors lie in a file, and whether all are
there. `pickle_interpreter` reads the pickles themselves and runs nothing that they name.
"""

import io
import os
import struct
import zipfile
from typing import NamedTuple

from ipadapter_jax.errors import WeightFileError
from ipadapter_jax.weights.formats.pickle_interpreter import (
    AGAIN,
    OPAQUE,
    SAVE,
    LazyTensor,
    PickleInterpreter,
    Refused,
    Unread,
    require,
)
from ipadapter_jax.weights.lazy import unsupported_form

# Far above any real checkpoint, and low enough that a hostile file costs neither minutes nor gigabytes.
_MAX_PICKLE, _MAX_DIRECTORY, _MAX_DEPTH = 1 << 24, 1 << 22, 64  # the first two in bytes
_MAX_NAMES = 1 << 24  # characters of all full names, and 64 for each entry: n dicts that share can spell 2^n names
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the older container
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
_PARTS, _MAX_WRAPPERS = (
    {"image_proj", "ip_adapter"},
    3,
)  # of an adapter; a state dict next to them does not replace them
UNNAMED = "(unnamed)"  # the name of a tensor that was saved alone


def read_torch_file(path: str | os.PathLike[str]) -> dict:
    """Read a `.bin`, `.pt` or `.ckpt` file: nested dicts with LazyTensor leaves, without loops.

    Keys are strings or integers; entries under other keys are left out. Numbers, strings and None stay as they are,
    everything else, lists included, becomes OPAQUE. A file of nothing but a list of tensors becomes a dict of them by
    their places, one of a single tensor {UNNAMED: tensor}. Raises WeightFileError naming the file when it is none of
    torch.save, damaged, hostile, or of a kind that is not supported.
    """
    tree = _read(path)
    branches, seen = [tree], {id(tree)}
    for branch in branches:  # which grows during the iteration
        for key, value in branch.items():
            if isinstance(value, Unread):
                branch[key] = OPAQUE
            elif isinstance(value, dict) and id(value) not in seen:
                branches.append(value)
                seen.add(id(value))
    return tree


def read_tensors(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of such a file by their full names, as `flatten` gives them. Raises WeightFileError as
    `read_torch_file`, and naming a tensor among them that lies there in a form that is not read."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in flatten(_read(path)).items():
        if isinstance(tensor, Unread):
            raise unsupported_form(path, name, tensor.form)
        found[name] = tensor
    return found


def _read(path: str | os.PathLike[str]) -> dict:
    """The tree with Unread leaves, too."""
    try:
        require(os.path.isfile(path), "there is no such file", "; check the path")  # nor a pipe, which would block
        with _File(path) as file:
            head = file.read_at(0, min(file.size, 4))
            require(head.startswith((b"PK\3\4", b"\x80")), "is not a file of torch.save")
            tree = _named(_read_zip(file) if head.startswith(b"PK") else _read_sequence(file))
        if type(tree) is not dict:
            raise Refused(f"holds no dict of tensors, nor a list of them{SAVE}")
        flatten({"": tree})  # refuses loops and the like here, where the name of the file is known
        return tree
    except (Refused, OSError) as error:
        raise WeightFileError(f"{path}: {error}") from None


def _named(tree: object) -> object:
    """Tensors that a file holds without names, as a dict; everything else as it is."""
    if isinstance(tree, LazyTensor | Unread):
        return {UNNAMED: tree}
    if isinstance(tree, list | tuple) and tree and all(isinstance(value, LazyTensor | Unread) for value in tree):
        return dict(enumerate(tree))
    return tree


def flatten(tree: dict) -> dict[str, LazyTensor | Unread]:
    """Flattens a tree of `read_torch_file` to its tensors, with names joined by dots, including those of a form that is
    not read. Of a file with a state dict next to other things, only the state dict."""
    pending = [("", 0, _state_dict(tree))]
    named, cost = {}, 0
    for prefix, depth, branch in pending:  # which grows during the iteration
        for key, value in branch.items():
            name = f"{prefix}{key}"
            cost += 64 + len(name)
            require(cost <= _MAX_NAMES and depth <= _MAX_DEPTH, "has too many entries, or nested too deep", SAVE)
            if isinstance(value, dict):
                pending.append((f"{name}.", depth + 1, value))
            elif isinstance(value, LazyTensor | Unread):
                require(named.setdefault(name, value) is value, f"has two tensors {str(key)[:60]!r}", SAVE)
    return named


def _state_dict(tree: dict) -> dict:
    """The content of "state_dict", or of "model" or the like if it holds tensors; else the whole tree."""
    for _ in range(_MAX_WRAPPERS):
        inner = next((tree[name] for name in _WRAPPERS if isinstance(tree.get(name), dict)), None)
        if inner is None or _PARTS & tree.keys() or ("state_dict" not in tree and not _holds_tensors(inner)):
            break
        tree = inner
    return tree


def _holds_tensors(tree: dict) -> bool:
    branches = [tree, *(inner for inner in tree.values() if isinstance(inner, dict))]
    return any(isinstance(value, LazyTensor | Unread) for branch in branches for value in branch.values())


class _File(io.FileIO):
    """Reads no more than the file has, so that a hostile file cannot make it allocate more."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path, "rb")
        self.path, self.size = os.fspath(path), os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Read for `zipfile`, whose time and memory grow with the directory that it reads."""
        size = self.size - self.tell() if size is None or size < 0 else size
        require(0 <= size <= _MAX_DIRECTORY, "has a damaged or far too large zip directory")
        return super().read(size)

    def read_at(self, position: int, length: int) -> bytes:
        require(0 <= position <= position + length <= self.size, f"is cut short or damaged: has {self.size} bytes")
        require(length <= _MAX_PICKLE, "has a far too large pickle", SAVE)
        self.seek(position)
        return super().read(length)


def _read_sequence(file: _File) -> object:
    """Read the older container and locate its storages."""
    machine, stream = PickleInterpreter(file.path, file.size), io.BytesIO(file.read_at(0, min(file.size, _MAX_PICKLE)))
    for known in (_MAGIC, _PROTOCOL):
        require(machine.run(stream) == known, "is a pickle, but not one of torch.save", SAVE)
    machine.run(stream)  # describes the computer; the storages are little-endian on all of them
    tree, keys = machine.run(stream), machine.run(stream)
    if type(keys) is not list or any(type(key) is not str for key in keys) or set(keys) != set(machine.storages):
        raise Refused(f"has storages of an unknown type, or lacks some{SAVE}")
    end = stream.tell()
    for key in keys:
        storage = machine.storages[key]
        same = struct.unpack("<q", file.read_at(end, 8)) == (storage.numel,)
        require(same, f"has a storage {key[:60]!r} of another size than it says")
        storage.position = end + 8
        end += 8 + storage.numel * storage.dtype.itemsize
    file.read_at(end, 0)
    return tree


class _Span(NamedTuple):
    """Where the bytes of a zip entry lie in the file."""

    start: int
    length: int


def _read_zip(file: _File) -> object:
    """Read the zip container and locate its storages."""
    try:
        listed = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error):
        raise Refused(f"is cut short or damaged: it starts as a zip file, but ends otherwise{AGAIN}") from None
    entries = {entry.filename: entry for entry in listed}
    require(len(entries) == len(listed), "has two zip entries of one name")

    def locate(name: str) -> _Span:
        require(name in entries, f"lacks its entry {name[:60]!r}")
        entry = entries[name]
        header, length = file.read_at(entry.header_offset, 30), entry.file_size
        start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        sound = header.startswith(b"PK\3\4") and entry.compress_size == length and start + length <= file.size
        require(stored and sound, f"has a compressed, encrypted or damaged entry {name[:60]!r}", SAVE)
        return _Span(start, length)

    folder = next((name[:-8] for name in entries if name.endswith("/data.pkl") and name.count("/") == 1), "")
    weights = folder and f"{folder}constants.pkl" not in entries
    arrays = any(name.endswith(".npy") for name in entries)
    require(not arrays, "is a NumPy archive (.npz) with no data.pkl", "; save its array alone with numpy.save (.npy)")
    require(weights, "is a zip file, but not one of weights: no data.pkl, or a TorchScript program", SAVE)
    if f"{folder}byteorder" in entries:
        require(file.read_at(*locate(f"{folder}byteorder")) == b"little", "is not little-endian", SAVE)
    machine, total = PickleInterpreter(file.path, file.size), 0
    tree = machine.run(io.BytesIO(file.read_at(*locate(f"{folder}data.pkl"))))
    for key, storage in machine.storages.items():
        storage.position, length = locate(f"{folder}data/{key}")
        total += length  # the entries of a bomb overlap
        same = length == storage.numel * storage.dtype.itemsize and total <= file.size
        require(same, f"has a storage {key[:60]!r} of another size than it says")
    return tree
