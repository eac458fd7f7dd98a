"""Settings of all tests: 8 virtual CPU devices, float32, and quick compilation where that pays."""

import os
import tempfile

# Subprocesses and pytest-xdist's workers inherit these. On a machine with a GPU,
# `JAX_PLATFORMS=cuda pytest` overrules the first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one process compiles, the others need not: half of what the programs under test take.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="jaxpoison-tests-")  # removed at exit
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", False)

# Modules that compile many tiny functions and run each once. Elsewhere, in training above all,
# slower code would cost more than its quicker compilation saves.
COMPILE_BOUND = {
    "test_hosts",
    "test_controls",
    "test_grid",
    "test_influence",
    "test_curvature",
    "test_solvers",
    "test_charvec_extraction",
    "test_charvec_centroids",
    "test_filters",
    "test_filters_rivals",
    "test_transfer_attacks",
    "test_scratch_attacks",
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Has XLA skip its expensive passes for the tests of the modules above."""
    if request.module.__name__.rpartition(".")[2] not in COMPILE_BOUND:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
