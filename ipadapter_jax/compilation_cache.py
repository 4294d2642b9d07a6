"""Compiled programs are kept on disk, so that the second start does not compile again."""

import os
from pathlib import Path
from typing import Any

import jax

_config: Any = jax.config  # its settings are made at run time, unknown to type checkers


def cache_folder() -> Path:
    """Where compiled programs are kept: jax's own setting (JAX_COMPILATION_CACHE_DIR), else this project's folder."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ipadapter_jax" / "compiled"
    return Path(_config.jax_compilation_cache_dir or own)


def cache_is_on() -> bool:
    """False where JAX_ENABLE_COMPILATION_CACHE=0 turned it off."""
    return bool(_config.jax_enable_compilation_cache)


def enable_compilation_cache() -> None:
    """Turns jax's persistent cache on, unless it has a folder already or was turned off."""
    if cache_is_on() and _config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs add up
