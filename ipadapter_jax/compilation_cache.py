"""Compiled programs are kept on disk, so that the second start does not compile again."""

import os
from pathlib import Path

import jax


def cache_folder() -> Path:
    """Where this project keeps compiled programs unless jax is told otherwise (JAX_COMPILATION_CACHE_DIR)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ipadapter_jax" / "compiled"


def enable_compilation_cache() -> None:
    """Turns jax's persistent cache on, unless it has a folder already or JAX_ENABLE_COMPILATION_CACHE=0 turned it off."""
    if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs add up
