"""Compiled programs that outlive the process."""

import os
from pathlib import Path
from typing import Any

import jax
import platformdirs


def keep_compiled(folder: Path | None = None) -> Path | None:
    """Keep compiled programs in a folder, so later processes reuse them. Call this before JAX compiles anything.

    The default folder is the one in `JAX_COMPILATION_CACHE_DIR` or in JAX's configuration, and otherwise the
    user's cache folder. Programs that compile in less than 0.3 seconds are not kept. Returns the folder, or None
    if JAX is configured to use none.
    """
    settings: Any = jax.config  # a type checker does not know its attributes
    named = "JAX_COMPILATION_CACHE_DIR" in os.environ or settings.jax_compilation_cache_dir is not None
    if folder is not None or not named:
        where = folder or platformdirs.user_cache_path("subliminal_theory") / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(where))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    used = settings.jax_compilation_cache_dir
    return Path(used) if used else None
