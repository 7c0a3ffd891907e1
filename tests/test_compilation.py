"""Compiled programs that a second process takes from the first one's folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from subliminal_theory.compilation import keep_compiled

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
folder = keep_compiled(*map(Path, sys.argv[1:]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(folder, any(name.endswith("cache_hits") for name in hits))
"""


def told(*arguments: Path, **environment: str) -> str:
    """What a process of its own says: the folder, and whether something was taken from it."""
    without = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**without, **environment})
    return done.stdout.strip()


@pytest.mark.slow
def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    assert told(tmp_path / "kept") == f"{tmp_path / 'kept'} False"
    assert told(tmp_path / "kept") == f"{tmp_path / 'kept'} True"


@pytest.mark.slow
@pytest.mark.parametrize("given", ["", "own"])
def test_what_jax_was_told_stays(tmp_path: Path, given: str) -> None:
    folder = str(tmp_path / given) if given else ""
    assert told(JAX_COMPILATION_CACHE_DIR=folder) == f"{folder or None} False"


@pytest.mark.slow
def test_otherwise_the_cache_of_the_user(tmp_path: Path) -> None:
    found = told(XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path))
    assert found.endswith("compiled False")
    assert str(tmp_path) in found
