"""Runs `ipadapter-jax doctor`: what is here, what is missing."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import jax

from ipadapter_jax.cli.doctor import Doctor
from ipadapter_jax.errors import InputError
from ipadapter_jax.ops.attention_kernels import named_kernel
from ipadapter_jax.runtime.compilation_cache import cache_folder, cache_is_local, cache_is_on, enable_compilation_cache
from ipadapter_jax.storage.ownership import ownership_problem
from ipadapter_jax.weights import bundled

_PACKAGES = (
    *("ipadapter-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers"),
    *("huggingface_hub", "safetensors", "numpy", "pillow"),
)
_OPTIONAL = {
    "tensorflow-datasets": "TFDS data sets (extra: tfds)",
    "torch": "comparison with PyTorch (extra: torch)",
    "diffusers": "comparison with PyTorch (extra: torch)",
}


_HEADS = (40, 80, 160)  # of Stable Diffusion 1.5


def doctor(_: Doctor) -> int:
    """Prints the report and returns the exit code."""
    missing, caches = [], [*_caches()]
    enable_compilation_cache()  # what is compiled below comes from no folder that others can write to
    parts = {"devices": _devices(), "programs": _programs(), "packages": _packages(missing)}
    parts |= {"model": _model(), "caches": caches}
    for title, lines in parts.items():
        print(title)
        for line in lines:
            print(f"  {line}")
    print("missing: " + ", ".join(missing) if missing else "nothing required is missing")
    return 1 if missing else 0


def _devices() -> Iterator[str]:
    yield f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}"
    for device in jax.local_devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        yield f"{device.platform} {device.id}: {device.device_kind}" + (f", {memory / 2**30:.1f} GiB" if memory else "")
    if jax.default_backend() == "cpu":
        yield "no accelerator: for NVIDIA install ipadapter-jax[gpu], for TPU ipadapter-jax[tpu]"


def _programs() -> Iterator[str]:
    """What decides how programs are compiled. No flag of XLA is set here: none was measured to pay."""
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION"):
        yield f"{name}: {os.environ.get(name) or 'not set'}"
    kernels = {head_dim: named_kernel(head_dim, "bfloat16") or "written out" for head_dim in _HEADS}
    yield "attention in bfloat16, by head_dim: " + ", ".join(f"{d} {name}" for d, name in kernels.items())


def _packages(missing: list[str]) -> Iterator[str]:
    for name in _PACKAGES:
        version = _version(name)
        yield f"{name} {version or 'MISSING'}"
        if version is None:
            missing.append(name)
    for name, use in _OPTIONAL.items():
        yield f"{name} {_version(name) or f'not installed; only for {use}'}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _model() -> Iterator[str]:
    size = _size(bundled.FOLDER) if bundled.FOLDER.is_dir() else "not here: install the package again"
    yield f"{bundled.NAME}: {bundled.FOLDER} ({size})"


def _caches() -> Iterator[str]:
    from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

    hub = f"{HF_HUB_CACHE} ({_size(Path(HF_HUB_CACHE))}){', offline' if is_offline_mode() else ''}"
    if HF_HUB_CACHE.startswith("~"):
        hub = "off, this user has no home folder; name another place with HF_HOME"
    yield f"compiled programs: {_compiled()}"
    yield f"Hugging Face Hub: {hub}"


def _compiled() -> str:
    if not cache_is_on():
        return "off (JAX_ENABLE_COMPILATION_CACHE)"
    try:
        folder = cache_folder()
    except InputError as error:
        return f"off, {error}"
    problem = ownership_problem(folder) if cache_is_local() else None
    return f"{'on' if problem is None else f'off, {problem}'}, {folder} ({_size(folder)})"


def _size(folder: Path) -> str:
    """Of all files below, each counted once although the Hub's cache links to them."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()] if folder.is_dir() else []
    return f"{sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB in {len(files)} files"
