"""Traced programs are kept on disk, so that a second process neither traces nor lowers what an earlier one did.

jax's persistent cache keeps what the compiler makes of a program, but finding it there takes the program, and making
that takes seconds for large networks. Here the program itself is kept (jax.export, StableHLO), under a name made of all
that it depends on: the source of this package, the releases of jax, devices, settings, and the arguments' shapes.
"""

import contextlib
import functools
import hashlib
import logging
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import core, export

from ipadapter_jax.errors import InputError
from ipadapter_jax.ops.attention_kernels import REFUSED
from ipadapter_jax.runtime.compilation_cache import cache_folder, cache_is_local, cache_is_on
from ipadapter_jax.storage.atomic_files import remove_partial_files, write_atomically
from ipadapter_jax.storage.ownership import make_private_folder, ownership_problem

log = logging.getLogger(__name__)
_config: Any = jax.config  # its settings are made at run time, unknown to type checkers

# Not promised to be stable between releases of jax, and so not kept across them.
_KERNELS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", "tpu_custom_call")


class _Call(NamedTuple):
    """What tells two programs of one function apart."""

    fixed: tuple[Any, ...]
    structure: Any
    shapes: tuple[Any, ...]
    settings: tuple[Any, ...]


class ExportedFunction:
    """A jitted function whose first `fixed` arguments are static, and whose programs are kept on disk.

    Where a program cannot be kept or read, it is traced as usual: `jitted` is the plain function.
    """

    def __init__(self, function: Callable, fixed: int):
        self.jitted = jax.jit(function, static_argnums=tuple(range(fixed)))
        self._name, self._fixed = function.__name__, fixed
        self._programs: dict[_Call, Callable] = {}
        self._opening = threading.Lock()
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        given = arguments[self._fixed :]
        leaves, structure = jax.tree.flatten(given)
        inside = any(isinstance(leaf, core.Tracer) for leaf in leaves)  # of another program, which has it then
        if inside or not cache_is_on() or _config.jax_disable_jit:
            return self.jitted(*arguments)
        shapes = tuple((jax.typeof(leaf), _place(leaf)) for leaf in leaves)
        call = _Call(arguments[: self._fixed], structure, shapes, _settings())
        program = self._programs.get(call)
        if program is None:
            with self._opening:  # several threads that ask for one program wait for it, rather than each make it
                program = self._programs.get(call) or self._open(call, arguments)
                self._programs[call] = program
        return program(*given)

    def forget(self) -> None:
        """As in a new process."""
        self._programs.clear()

    def _open(self, call: _Call, arguments: tuple[Any, ...]) -> Callable:
        """The program from disk, or traced here and put there; the plain function where neither can be done."""
        try:
            file = _safe_folder() / f"{self._name}-{_digest(self._name, call)}.program"
            content = _read(file)
            if content is None:
                checks = [export.DisabledSafetyCheck.custom_call(name) for name in _KERNELS]
                content = bytes(export.export(self.jitted, disabled_checks=checks)(*arguments).serialize())
                if not REFUSED:  # else it lacks a kernel that this machine may have the next time
                    with contextlib.suppress(InputError, OSError):  # a full disk
                        make_private_folder(file.parent)
                        remove_partial_files(file.parent)
                        write_atomically(file, hashlib.sha256(content).digest() + content)
                        file.chmod(0o600)
            program = export.deserialize(bytearray(content)).call
            return jax.jit(program).lower(*arguments[self._fixed :]).compile()
        except Exception as error:  # a full disk, what jax cannot export, a kernel that this machine lacks
            log.debug("%s: not kept: %s", self._name, error)
            return functools.partial(self.jitted, *call.fixed)


def _safe_folder() -> Path:
    """The folder of programs. Raises InputError where others could have put some there: they are run."""
    folder = cache_folder()
    if problem := ownership_problem(folder):
        log.warning("compiled programs are neither read nor kept: %s", problem)
        raise InputError(str(problem))
    return folder


def _read(file: Path) -> bytes | None:
    """What was kept, unless it is not there, damaged or not ours."""
    if problem := ownership_problem(file):
        log.warning("a compiled program on disk is not used, but made again: %s", problem.why)
        return None
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, content = content[:32], content[32:]
    if hashlib.sha256(content).digest() != digest:
        log.warning("%s is damaged, and the program in it is made again", file)
        return None
    return content


def export_cached(fixed: int) -> Callable[[Callable], ExportedFunction]:
    """Decorates a pure function of which the first `fixed` arguments are static."""
    return lambda function: ExportedFunction(function, fixed)


def register_serializable(*kinds: type[tuple]) -> None:
    """Lets programs be kept whose arguments or results hold these named tuples."""
    for kind in kinds:
        export.register_namedtuple_serialization(kind, serialized_name=f"{kind.__module__}.{kind.__name__}")


def _place(leaf: Any) -> Any:
    """Where an argument lies. On one device every way of saying so is the same."""
    sharding = getattr(leaf, "sharding", None)
    devices = () if sharding is None else tuple(sharding.device_set)
    return (sharding if len(devices) > 1 else devices), getattr(leaf, "committed", False)


def _settings() -> tuple[Any, ...]:
    """Of jax, those that change what is traced."""
    names = ["default_matmul_precision", "enable_x64", "numpy_dtype_promotion", "threefry_partitionable"]
    names += ["default_device"]
    return (jax.default_backend(), *(getattr(_config, f"jax_{name}") for name in names))


def _digest(name: str, call: _Call) -> str:
    devices = [(device.platform, device.device_kind) for device in jax.devices()]
    if " at 0x" in str(call):
        raise ValueError("a static argument prints an address, which is another one in every process")
    if not cache_is_local():
        raise ValueError("the cache is no folder of this machine")
    releases = [version(package) for package in ("jax", "jaxlib", "flax", "numpy")]
    depends = (name, _SOURCE, releases, jax.local_devices()[0].client.platform_version, devices, str(call))
    return hashlib.sha256(repr(depends).encode()).hexdigest()[:32]


def _source() -> str:
    """A digest of this package's files of Python."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


_SOURCE = _source()  # of what is imported now, not of what may lie there when a program is traced
