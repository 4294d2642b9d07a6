"""Damages files of weights at random and opens what comes of it: only whole, finite tensors under their own names may
come through.

    python -m tests.fault_injection.fuzz_weights --count 1000000 --seed 7

A trial takes a good file (an adapter as safetensors or pickle, an image encoder in OpenCLIP's layout, as msgpack or as
the index of its shards, a base model of one file), damages it and loads it as the product does. What may happen: an
error in one line that names the file; or exactly the tensors of the good file by name, shape and dtype, all finite, and
with the same bits where the file carries a digest. Everything else is a fault and is printed with its trial's number.
"""

import collections
import random
import re
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tqdm
import tyro

from ipadapter_jax.errors import InputError
from ipadapter_jax.weights.components import IMAGE_ENCODER
from ipadapter_jax.weights.dtype_cast import all_finite
from ipadapter_jax.weights.formats.safetensors_writer import DIGEST
from ipadapter_jax.weights.formats.tensor_files import open_tensors
from ipadapter_jax.weights.image_encoder import open_image_encoder
from ipadapter_jax.weights.inspect import inspect_weights
from ipadapter_jax.weights.ip_adapter_file import load_ip_adapter, open_ip_adapter
from ipadapter_jax.weights.load_tree import leaves
from ipadapter_jax.weights.model_source import ModelSource
from ipadapter_jax.weights.open_base_model import open_base
from ipadapter_jax.weights.open_component import LazyComponent, open_weights, read_component_config
from tests.fault_injection import fuzz_seeds

SECONDS, MEMORY = 2.0, 1.5  # what a trial may take: time, and memory in sizes of its file
OVERHEAD = 1 << 19  # bytes that any file may take beside: digests read 256 KB at a time
_MEMORY_EVERY = 25  # trials; tracing makes them slow
# What Python reports when something is run that a file could have named.
_EXECUTION = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


class Content(NamedTuple):
    """What a file gave: its arrays by their names there, and whether it says what they must be."""

    arrays: dict[str, np.ndarray]
    digest: bool


def read_adapter(path: Path) -> Content:
    inspect_weights(path)
    file = open_ip_adapter(path)
    load_ip_adapter(file, file.widths, np.dtype("float32"), put=lambda array: array)
    return Content({name: np.array(tensor.read()) for name, tensor in file.tensors.items()}, DIGEST in file.metadata)


def read_encoder(path: Path) -> Content:
    opened = open_image_encoder(path)
    opened.load(np.dtype("float32"), put=lambda array: array)
    return Content({name: np.array(tensor.read()) for name, tensor in opened.weights.tensors.items()}, False)


def read_network(path: Path) -> Content:
    opened = open_weights(read_component_config(IMAGE_ENCODER, path.parent / "config.json"), open_tensors(path), path)
    return Content(_arrays(opened), False)


def read_single_file(path: Path) -> Content:
    base = open_base(ModelSource(path, config=path.parent / "config"))
    parts = {name: _arrays(base.part(name)) for name in base.components}
    return Content({f"{part} {name}": array for part, arrays in parts.items() for name, array in arrays.items()}, False)


def _arrays(opened: LazyComponent) -> dict[str, np.ndarray]:
    params = opened.load(np.dtype("float16"), put=lambda array: array).params
    return {"/".join(path): leaf for path, leaf in leaves(params).items()}


class WeightKind(NamedTuple):
    """What writes good files into an empty folder, and what reads a damaged one there."""

    seeds: Callable[[Path], list[Path]]
    read: Callable[[Path], Content]


KINDS = {
    "safetensors": WeightKind(fuzz_seeds.safetensors, read_adapter),
    "bin": WeightKind(fuzz_seeds.pickles, read_adapter),
    "openclip": WeightKind(fuzz_seeds.openclip, read_encoder),
    "msgpack": WeightKind(fuzz_seeds.msgpack, read_network),
    "index": WeightKind(fuzz_seeds.index, read_network),
    "single file": WeightKind(fuzz_seeds.single_file, read_single_file),
}


class Fuzzer:
    """Trials over good files of a kind; `seen` counts what they ended in, `faults` says what must not happen."""

    def __init__(self, folder: Path, kind: str, seed: int):
        self._path, self._rng = folder / "damaged", random.Random(seed)
        self._files, self._read = KINDS[kind].seeds(folder), KINDS[kind].read
        self._good = [self._read(file) for file in self._files]
        self._executed: list[str] = []
        self.seen: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        sys.addaudithook(lambda event, _: self._executed.append(event) if event in _EXECUTION else None)

    def run(self, count: int) -> None:
        for number in tqdm.trange(count, disable=None):
            which = self._rng.randrange(len(self._files))
            content = damaged(self._files[which].read_bytes(), self._rng)
            self._path.write_bytes(content)
            if number % _MEMORY_EVERY == 0:
                tracemalloc.start()
            started = time.process_time()  # other processes may be busy
            outcome = self._outcome(self._good[which])
            if (took := time.process_time() - started) > SECONDS:
                self._fault(number, f"took {took:.1f} s")
            if tracemalloc.is_tracing():
                if (peak := tracemalloc.get_traced_memory()[1]) > MEMORY * len(content) + OVERHEAD:
                    self._fault(number, f"took {peak} bytes for {len(content)}")
                tracemalloc.stop()
            if self._executed:
                self._fault(number, f"executed {self._executed.pop()}")
            self.seen[outcome] += 1
            if outcome.startswith("fault"):
                self._fault(number, outcome)

    def _fault(self, number: int, what: str) -> None:
        self.faults.append(f"trial {number}: {what}")

    def _outcome(self, good: Content) -> str:
        try:
            return _compared(good, self._read(self._path))
        except InputError as error:
            message = str(error)
            proper = message.isprintable() and str(self._path.parent) in message and len(message) < 1000
            return "refused" if proper else f"fault: message {message[:200]!r}"
        except Exception as error:
            return f"fault: {type(error).__name__} {str(error)[:200]}"


def _compared(good: Content, found: Content) -> str:
    if {name: (a.shape, a.dtype) for name, a in found.arrays.items()} != {
        name: (a.shape, a.dtype) for name, a in good.arrays.items()
    }:
        return "fault: other names, shapes or dtypes"
    if not all(all_finite(array) for array in found.arrays.values()):
        return "fault: numbers that are not finite"
    changed = any(found.arrays[name].tobytes() != array.tobytes() for name, array in good.arrays.items())
    if changed and good.digest and found.digest:
        return "fault: other bits under a digest"
    return "other bits, no digest" if changed else "unharmed"


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with one to sixteen faults: bits, bytes, blocks, lengths, digits, names, the end."""
    raw = bytearray(content)
    head = min(len(raw), 8 + int.from_bytes(raw[:8], "little")) if raw[8:9] == b"{" else len(raw)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not raw:
            break
        # Most of a file is numbers, where little can go wrong.
        at = rng.randrange(min(head, len(raw)) if rng.random() < 0.7 else len(raw))
        _FAULTS[rng.randrange(len(_FAULTS))](raw, at, rng)
    return bytes(raw)


def _bit(raw: bytearray, at: int, rng: random.Random) -> None:
    raw[at] ^= 1 << rng.randrange(8)


def _byte(raw: bytearray, at: int, rng: random.Random) -> None:
    raw[at] = rng.choice(b'\0\1\2()]}{"[,:.0123456789tsueaRQ\x80\x81\x85\x8a\x93\xff')


def _cut(raw: bytearray, at: int, rng: random.Random) -> None:
    del raw[at : at + rng.choice([1, 2, 8, 100])]


def _insert(raw: bytearray, at: int, rng: random.Random) -> None:
    start = rng.randrange(len(raw))
    raw[at:at] = raw[start : start + rng.randrange(1, 60)]


def _overwrite(raw: bytearray, at: int, rng: random.Random) -> None:
    block = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4), b"\0\0\0\x80", b"\0\x7c\0\x7c"])
    raw[at : at + 4] = block[: len(raw) - at]


def _end(raw: bytearray, at: int, rng: random.Random) -> None:
    if rng.random() < 0.3:
        del raw[at + 1 :]


def _respell(raw: bytearray, at: int, rng: random.Random) -> None:
    """Two words of the same kind exchanged near this place: names, numbers, dtypes."""
    words = list(re.finditer(rb"[A-Za-z_]{3,}|\d+", bytes(raw[at : at + 2000])))
    if len(words) > 1:
        first, second = sorted(rng.sample(words, 2), key=lambda word: word.start())
        for word, other in ((second, first), (first, second)):
            raw[at + word.start() : at + word.end()] = other.group()


_FAULTS: list[Callable[[bytearray, int, random.Random], None]] = [
    *(_bit, _byte, _cut, _insert, _overwrite, _end, _respell),
]


def main(
    count: Annotated[int, tyro.conf.arg(help="damaged files of each kind")] = 30_000,
    seed: int = 0,
) -> int:
    """Prints what came of all trials. Returns 1 when there was a fault."""
    faults = 0
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            fuzzer = Fuzzer(Path(folder), kind, seed)
            fuzzer.run(count)
        print(kind, dict(fuzzer.seen), f"{len(fuzzer.faults)} faults", *fuzzer.faults[:20], sep="\n  ")
        faults += len(fuzzer.faults)
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
