"""Follows the pickles inside a file of `torch.save` without PyTorch and without unpickling.

A pickle is a program, and the usual reader runs whatever function it names. A `pickle.Unpickler` that allows only a few
functions would still follow opcodes that allocate without bound, and would fail on objects of unknown classes. Here the
opcodes drive a small interpreter with limits, which builds dicts, lists, tuples and descriptions of tensors only.
What it does not know, such as the callbacks in a checkpoint of PyTorch Lightning, becomes OPAQUE and is never imported.
`torch_pickle` finds where the bytes of the tensors are in the file.
"""

import io
import math
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ipadapter_jax.errors import WeightFileError

# Far above any real checkpoint, and low enough that a hostile file costs neither minutes nor gigabytes.
_MAX_OPCODES, _MAX_NAME, _MAX_DIMENSIONS = 1_000_000, 1000, 32
_MALFORMED_TENSOR = "has a tensor with a wrong shape, stride or offset"
_EXPANDED = 1 << 20  # bytes that a tensor with repeated elements may have, however small its file
# The remedies at the end of a refusal.
AGAIN = "; copy or download the file again"
SAVE = "; load it with PyTorch and save its state dict as safetensors"

OPAQUE = type("Opaque", (), {})()  # whatever is neither a tensor nor a dict, a number, a string or None
_TENSOR, _PARAMETER, _ORDERED_DICT = object(), object(), object()  # the functions that the machine knows
_DTYPES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": ml_dtypes.bfloat16, "Bool": "?", "Byte": "u1"}
_DTYPES |= {"Char": "i1", "Short": "i2", "Int": "i4", "Long": "i8", "ComplexFloat": "c8", "ComplexDouble": "c16"}
_GLOBALS: Mapping[tuple[str, str], object] = {
    ("torch", f"{name}Storage"): np.dtype(dtype) for name, dtype in _DTYPES.items()
} | {
    ("torch.storage", "UntypedStorage"): np.dtype("u1"),
    ("torch._utils", "_rebuild_tensor_v2"): _TENSOR,
    ("torch._utils", "_rebuild_parameter"): _PARAMETER,
    ("collections", "OrderedDict"): _ORDERED_DICT,
}
# Functions that torch calls to build tensors that are not stored as one number after the other.
_FORMS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without content (of the device meta)",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
    "_rebuild_from_type_v2": "a tensor of a class of its own",
}
_LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING"} | {
    *("BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


@dataclass(frozen=True)
class Foreign:
    """A function, a class or a data type of torch that is not known here."""

    name: str


@dataclass(frozen=True)
class Unread:
    """A tensor of a form that is not read, and which: "float8_e4m3fn", "sparse"."""

    form: str


class Refused(Exception):
    """What is wrong, and the remedy; `read_torch_file` puts the file's name before it."""


def require(condition: object, problem: str, remedy: str = AGAIN) -> None:
    if not condition:
        raise Refused(problem + remedy)


@dataclass(eq=False)
class Storage:
    path: str
    dtype: np.dtype
    numel: int
    position: int = -1  # in the file; the older container tells it only after the pickle


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still in its file; offset, strides and span are in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    storage: Storage
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
            raise WeightFileError(f"{path}: has changed since it was opened{AGAIN}") from None
        view = np.ndarray(self.shape, self.dtype, raw, 0, self.strides)
        if self.dtype == np.bool_:  # a bool of NumPy must be 0 or 1, which a file cannot promise
            view = view.view(np.uint8) != 0
        return np.array(view, order="C")


_PLAIN_VALUES = (bool, int, float, str, bytes, dict, LazyTensor, Unread)


class PickleInterpreter:
    """Follows the pickles of a file and notes their storages.

    Values are shared, never copied, hashed or compared in depth: an opcode costs no more than the bytes it brings.
    """

    def __init__(self, path: str, file_size: int):
        self.path, self.file_size, self.opcodes = path, file_size, 0
        self.storages: dict[str, Storage] = {}  # by their names; whoever reads the container sets their positions

    def run(self, stream: io.BytesIO) -> object:
        """Follow one pickle and return what it describes."""
        stack, outer, memo = [], [], {}  # outer: the stacks below the marks
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self.opcodes += 1
                require(self.opcodes <= _MAX_OPCODES, "has too many pickle opcodes", SAVE)
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
            raise Refused(f"is damaged or cut short near byte {stream.tell()} of its pickle{AGAIN}") from None

    def _result(self, name: str, argument: object, below: list[object], items: list[object]) -> object:
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
                    # Hashing anything else than these may never end.
                    is_name = len(key) <= _MAX_NAME and key.isprintable() if type(key) is str else _is_size(key)
                    if is_name and type(target) is dict:
                        plain = value is None or type(value) in _PLAIN_VALUES
                        target[key] = value if plain else OPAQUE
                return target
            case "GLOBAL" | "STACK_GLOBAL":
                match below or str(argument).split(" ", 1):
                    case [str(module), str(name)]:
                        foreign = module in ("torch", "torch._utils", "torch._tensor") and len(name) <= _MAX_NAME
                        return _GLOBALS.get((module, name), Foreign(name) if foreign else OPAQUE)
                return OPAQUE
            case "REDUCE" | "NEWOBJ":
                return self._call(*below)
            case "BINPERSID":
                return self._storage(*below)
            case "BUILD":  # would set the state of an object
                return below[0]
            case "INST" | "OBJ" | "NEWOBJ_EX" | "EMPTY_SET" | "ADDITEMS" | "FROZENSET":
                return OPAQUE
        raise Refused(f"uses the pickle opcode {name}, which no weights need{SAVE}")

    def _call(self, function: object, arguments: object) -> object:
        if type(arguments) is not tuple:
            return OPAQUE
        count = len(arguments)
        if function is _ORDERED_DICT and count == 0:
            return {}
        if function is _PARAMETER and count == 3:
            return arguments[0]
        if function is _TENSOR and 6 <= count <= 7 and type(arguments[0]) is Storage:
            return self._tensor(*arguments[:4])
        if type(function) is Foreign and function.name.startswith("_rebuild_") and count > 0:
            dtypes = [value.name for value in arguments if type(value) is Foreign]
            return Unread(_FORMS.get(function.name) or (dtypes or ["an unknown form"])[0])
        return OPAQUE

    def _storage(self, identity: object) -> object:
        """Note ("storage", type, key, device, numel); the older container appends a None: it is no view of another."""
        if type(identity) is not tuple or not 5 <= len(identity) <= 6 or identity[0] != "storage":
            return OPAQUE
        if not isinstance(identity[1], np.dtype):
            return OPAQUE
        _, dtype, key, _, numel, *view = identity
        proper = type(key) is str and _is_size(numel) and view in ([], [None])
        require(proper, "has a storage of unknown form", SAVE)
        storage = self.storages.setdefault(key, Storage(self.path, dtype, numel))
        require((storage.dtype, storage.numel) == (dtype, numel), f"has two storages of the name {key[:60]!r}")
        return storage

    def _tensor(self, storage: Storage, offset: object, shape: object, strides: object) -> LazyTensor:
        (start,), lengths, steps = _sizes((offset,)), _sizes(shape), _sizes(strides)
        require(len(lengths) == len(steps), _MALFORMED_TENSOR)
        # The stride of a single element is never used and may be any number.
        size = storage.dtype.itemsize
        steps = tuple(step * size if length > 1 else 0 for length, step in zip(lengths, steps, strict=True))
        span = 0 if 0 in lengths else size + sum((n - 1) * step for n, step in zip(lengths, steps, strict=True))
        require(start * size + span <= storage.numel * size, "has a tensor that reaches outside its storage")
        fits = math.prod(length or 1 for length in lengths) * size <= max(self.file_size, _EXPANDED)
        require(fits, "has a tensor that is larger than the file itself", SAVE)
        return LazyTensor(lengths, storage.dtype, storage, start * size, steps, span)


def _sizes(value: object) -> tuple[int, ...]:
    """The shape or the strides of a tensor. Raises Refused for anything else."""
    if type(value) is not tuple or len(value) > _MAX_DIMENSIONS or not all(map(_is_size, value)):
        raise Refused(f"{_MALFORMED_TENSOR}{AGAIN}")
    return value


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
