"""Settings of all tests: 8 virtual CPU devices, float32, quick compilation, one cache for all."""

import os
import tempfile

# Programs under test and pytest-xdist's workers inherit these. On a machine with a GPU,
# `JAX_PLATFORMS=cuda pytest` overrules the first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most tests compile more than they compute. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` tests what
# users run, and takes half as long again.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What one process compiles, the others need not: half of what the programs under test take.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="jaxpoison-tests-")  # removed at exit
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax

# XLA's newer way to emit fused loops takes twice as long to compile. Later versions have no other.
if jax.__version_info__ < (0, 11) and os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0":
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", False)
