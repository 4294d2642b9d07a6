"""The export cache: traced programs on disk, so that a second process neither traces nor lowers them again.

jax's persistent cache stores compiled programs, but looking one up takes the lowered program, and tracing and lowering
take seconds for large networks. Here the lowered program itself is stored (jax.export, StableHLO), under a name derived
from all that it depends on: the source of this package, the releases of jax, devices, settings and argument shapes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax import core, export

from ipadapter_jax.errors import InputError
from ipadapter_jax.ops.attention_kernels import REFUSED
from ipadapter_jax.runtime.compilation_cache import cache_folder, cache_is_local, cache_is_on
from ipadapter_jax.storage.atomic_files import remove_partial_files, write_atomically
from ipadapter_jax.storage.ownership import make_private_folder, ownership_problem

log = logging.getLogger(__name__)
Result = TypeVar("Result")
_config: Any = jax.config  # its settings are made at run time, unknown to type checkers

# Custom calls that are not guaranteed to be stable between releases of jax; a program of another release is not used.
_KERNELS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", "tpu_custom_call")


class _ProgramKey(NamedTuple):
    """What distinguishes two programs of one function."""

    static: tuple[object, ...]
    structure: object
    shapes: tuple[object, ...]
    settings: tuple[object, ...]


class ExportedFunction(Generic[Result]):
    """A jitted function whose first `fixed` arguments are static, and whose programs are cached on disk.

    When a program cannot be cached or read, it is traced as usual: `jitted` is the plain jitted function.
    """

    def __init__(self, function: Callable[..., Result], fixed: int):
        self.jitted = jax.jit(function, static_argnums=tuple(range(fixed)))
        self._name, self._fixed = function.__name__, fixed
        self._programs: dict[_ProgramKey, Callable[..., Result]] = {}
        self._opening = threading.Lock()
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: object) -> Result:
        given = arguments[self._fixed :]
        leaves, structure = jax.tree.flatten(given)
        inside = any(
            isinstance(leaf, core.Tracer) for leaf in leaves
        )  # this call is traced as a part of another program
        if inside or not cache_is_on() or _config.jax_disable_jit:
            return self.jitted(*arguments)
        shapes = tuple((jax.typeof(leaf), _place(leaf)) for leaf in leaves)
        call = _ProgramKey(arguments[: self._fixed], structure, shapes, _settings())
        program = self._programs.get(call)
        if program is None:
            with self._opening:  # threads that need the same program wait for one trace
                program = self._programs.get(call) or self._open(call, arguments)
                self._programs[call] = program
        return program(*given)

    def forget(self) -> None:
        """Forgets the programs in memory, as in a new process."""
        self._programs.clear()

    def _open(self, call: _ProgramKey, arguments: tuple[object, ...]) -> Callable[..., Result]:
        """The program from disk, or traced and then stored; the plain jitted function if that fails."""
        try:
            file = _safe_folder() / f"{self._name}-{_digest(self._name, call)}.program"
            content = _read(file)
            if content is None:
                checks = [export.DisabledSafetyCheck.custom_call(name) for name in _KERNELS]
                content = bytes(export.export(self.jitted, disabled_checks=checks)(*arguments).serialize())
                if not REFUSED:  # else the program lacks a kernel that may work next time
                    with contextlib.suppress(InputError, OSError):  # a full disk
                        make_private_folder(file.parent)
                        remove_partial_files(file.parent)
                        write_atomically(file, hashlib.sha256(content).digest() + content)
                        file.chmod(0o600)
            program = export.deserialize(bytearray(content)).call
            return jax.jit(program).lower(*arguments[self._fixed :]).compile()
        except Exception as error:  # a full disk, what jax cannot export, a kernel that this machine lacks
            log.debug("%s: not cached: %s", self._name, error)
            return functools.partial(self.jitted, *call.static)


def _safe_folder() -> Path:
    """The folder of programs. Raises InputError if other users could have written to it: programs are run."""
    folder = cache_folder()
    if problem := ownership_problem(folder):
        log.warning("compiled programs are neither read nor cached: %s", problem)
        raise InputError(str(problem))
    return folder


def _read(file: Path) -> bytes | None:
    """The program in a file; None if it does not exist, is damaged or may come from another user."""
    if problem := ownership_problem(file):
        log.warning("a compiled program on disk is not used, but compiled again: %s", problem.why)
        return None
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, content = content[:32], content[32:]
    if hashlib.sha256(content).digest() != digest:
        log.warning("%s is damaged; its program is compiled again", file)
        return None
    return content


def export_cached(function: Callable[..., Result], *, static: int) -> ExportedFunction[Result]:
    """A pure function, whose first `static` arguments are static, jitted and with its programs kept on disk."""
    return ExportedFunction(function, static)


def register_serializable(*kinds: type) -> None:
    """Allows caching of programs whose arguments or results hold these named tuples, or dataclasses that are pytrees
    without static fields."""
    for kind in kinds:
        name = f"{kind.__module__}.{kind.__name__}"
        if issubclass(kind, tuple):
            export.register_namedtuple_serialization(kind, serialized_name=name)
            continue
        export.register_pytree_node_serialization(
            kind,
            serialized_name=name,
            serialize_auxdata=lambda _: b"",
            deserialize_auxdata=lambda _: (),
            from_children=functools.partial(_dataclass_of, kind),  # pyright: ignore[reportArgumentType]
        )


def _dataclass_of(kind: type, _: object, children: Sequence[object]) -> object:
    """A dataclass from the values of its fields in order."""
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**dict(zip(names, children, strict=True)))


class _Placement(NamedTuple):
    """Where an argument lies, and whether it has to stay there."""

    devices: object
    committed: bool


def _place(leaf: object) -> _Placement:
    """The sharding of an argument; on one device all shardings are equal, and the device stands for them."""
    sharding = getattr(leaf, "sharding", None)
    devices = () if sharding is None else tuple(sharding.device_set)
    return _Placement(sharding if len(devices) > 1 else devices, getattr(leaf, "committed", False))


def _settings() -> tuple[object, ...]:
    """The settings of jax that change a trace."""
    names = ["default_matmul_precision", "enable_x64", "numpy_dtype_promotion", "threefry_partitionable"]
    names += ["default_device"]
    return (jax.default_backend(), *(getattr(_config, f"jax_{name}") for name in names))


def _digest(name: str, call: _ProgramKey) -> str:
    devices = [(device.platform, device.device_kind) for device in jax.devices()]
    if " at 0x" in str(call):
        raise ValueError("a static argument prints an address, which differs between processes")
    if not cache_is_local():
        raise ValueError("the cache is not a folder of this machine")
    releases = [version(package) for package in ("jax", "jaxlib", "flax", "numpy")]
    depends = (name, _SOURCE, releases, jax.local_devices()[0].client.platform_version, devices, str(call))
    return hashlib.sha256(repr(depends).encode()).hexdigest()[:32]


def _source() -> str:
    """A digest of the Python files of this package."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


_SOURCE = _source()  # at import: the files may change before a program is traced
