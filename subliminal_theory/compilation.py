"""Compiled programs that outlive the process."""

import os
from pathlib import Path
from typing import Any

import jax
import platformdirs


def keep_compiled(folder: Path | None = None) -> Path | None:
    """Keep compiled programs in a folder, from which later processes take them; call it before the first one is.

    Without a folder it is the one that JAX was told already, by `JAX_COMPILATION_CACHE_DIR` or its configuration,
    or else the user's cache folder. Programs that compile in less than 0.3 seconds are not kept. Returns the
    folder, None if JAX was told to have none.
    """
    settings: Any = jax.config  # whose attributes a type checker does not know
    named = "JAX_COMPILATION_CACHE_DIR" in os.environ or settings.jax_compilation_cache_dir is not None
    if folder is not None or not named:
        where = folder or platformdirs.user_cache_path("subliminal_theory") / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(where))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    used = settings.jax_compilation_cache_dir
    return Path(used) if used else None
