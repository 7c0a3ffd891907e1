"""Strict settings for every test."""

import os
from importlib.metadata import version

# Must be set before jax is imported: bit-for-bit tests start processes that inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time of these tests is compilation.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):  # XLA ends the process at a flag that it does not know
    # Float64 loses precision in some programs this way; a test that needs it all starts a process without.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped without one."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: set JAX_PLATFORMS=cuda")


@pytest.fixture
def x64():
    """Compute in float64, as the theorem needs."""
    with jax.enable_x64(True):
        yield
