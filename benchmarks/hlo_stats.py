"""Reads a program that XLA compiled: its kernels, the memory that they read and write, and the collectives."""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\) -> .*? \{\n(.*?)^\}", re.DOTALL | re.MULTILINE)
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "after-all"}
_LINES_WITHIN = re.compile(r"\{\n([^\n]*)\n\}(?=[},])")  # of what Pallas notes of its kernels
# How TPUs' fusions are named that move numbers alone.
_LAYOUT = ("copy", "pad", "slice", "broadcast", "reshape", "transpose", "select")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a compiled program."""

    name: str
    operation: str
    text: str
    bytes_read: int
    bytes_written: int

    @property
    def cycles(self) -> int:
        """What the compiler for TPUs reckons with; 0 where it says nothing."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else 0


class Group(NamedTuple):
    """Kernels of one kind."""

    kernels: int
    bytes: int
    cycles: int


def byte_count(shape: str) -> int:
    """Of "f32[2,3]{1,0}" or of all arrays of a tuple."""
    return sum(
        _SIZES.get(kind, 0) * math.prod(int(n) for n in axes.split(",") if n) for kind, axes in _SHAPE.findall(shape)
    )


def instructions(body: str) -> Iterator[Instruction]:
    """Those of one computation, without what costs nothing."""
    shapes: dict[str, str] = {}
    for line in body.splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, shape, operation, rest = found.groups()
        shapes[name] = shape
        if operation in _FREE:
            continue
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        read = sum(byte_count(shapes.get(operand, "")) for operand in operands)
        yield Instruction(name, operation, line, read, byte_count(shape))


def computations(text: str) -> dict[str, list[Instruction]]:
    """By name, as compiled.as_text() prints them."""
    found = _COMPUTATION.findall(_LINES_WITHIN.sub(r"{\1}", text))
    return {name: list(instructions(body)) for name, body in found}


def main_computation(text: str) -> list[Instruction]:
    """The one that moves most memory: the body of the denoising loop, or the whole training step."""
    reached = set(re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", text))
    loops = set(re.findall(r"body=%?([\w.\-]+)", text))
    candidates = {n: i for n, i in computations(text).items() if n not in reached or n in loops}
    return max(candidates.values(), key=lambda found: sum(i.bytes_read + i.bytes_written for i in found))


def kind(instruction: Instruction, inside: list[Instruction]) -> str:
    """What a person would call the kernel; `inside` is the computation that a fusion calls."""
    target = re.search(r'custom_call_target="([^"]+)"', instruction.text)
    if target:
        names = {"fmha": "attention (cuDNN)", "conv": "convolution", "gemm": "matrix product", "tpu": "Pallas's kernel"}
        return next((name for part, name in names.items() if part in target[1]), target[1])
    if any(instruction.operation.startswith(name) for name in COLLECTIVES):
        return "collective"
    if instruction.cycles:
        return _kind_on_tpu(instruction, {one.operation for one in inside})
    if instruction.operation != "fusion":
        return instruction.operation
    emitter = re.search(r'"kind":"__(\w+)"', instruction.text)
    if emitter and "gemm" in emitter[1]:
        return "matrix product"
    return "norm, softmax or sum" if emitter or "kind=kInput" in instruction.text else "elementwise"


def _kind_on_tpu(instruction: Instruction, inside: set[str]) -> str:
    """There all products are convolutions, and often more work is fused with one of them."""
    if "convolution" in inside | {instruction.operation}:
        return "product or convolution"
    if instruction.name.startswith(_LAYOUT):
        return "copy, padding, layout"
    return "norm, softmax or sum" if "reduce" in inside else "elementwise"


def groups(text: str) -> dict[str, Group]:
    """Kernels of the main computation, their bytes and cycles, by kind, the most bytes first."""
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    called = computations(text)
    for found in main_computation(text):
        if not found.operation.endswith("-done"):
            callee = re.search(r"calls=%?([\w.\-]+)", found.text)
            of_kind = sums[kind(found, called.get(callee[1], []) if callee else [])]
            of_kind[0] += 1
            of_kind[1] += found.bytes_read + found.bytes_written
            of_kind[2] += found.cycles
    return {name: Group(*values) for name, values in sorted(sums.items(), key=lambda item: -item[1][1])}


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of whole arrays that are summed or gathered, by collective; those in loops count once."""
    sums: defaultdict[str, int] = defaultdict(int)
    gathered: set[str] = set()
    for instruction in itertools.chain(*computations(text).values()):
        for name in COLLECTIVES:
            if instruction.operation in (name, f"{name}-start") and not _goes_on(instruction, gathered):
                sums[name] += max(instruction.bytes_read, instruction.bytes_written - _repeated(instruction))
    return dict(sums)


def _goes_on(instruction: Instruction, gathered: set[str]) -> bool:
    """Programs for TPUs spread a gather over the kernels that run meanwhile, and name it, with its channel, in each."""
    channel = re.search(r"channel_id=\d+", instruction.text)
    if channel is None or not instruction.operation.startswith("all-gather"):
        return False
    seen = channel[0] in gathered
    gathered.add(channel[0])
    return seen


def _repeated(instruction: Instruction) -> int:
    """The start of an asynchronous collective names its operands among its results."""
    return instruction.bytes_read if re.search(r"= \(\(", instruction.text) else 0
