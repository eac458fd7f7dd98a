"""Settings of all tests: 8 virtual CPU devices, float32, quick compilation, one cache for all."""

import gc
import os
import tempfile

# Programs under test and pytest-xdist's workers inherit these. On a machine with a GPU,
# `JAX_PLATFORMS=cuda pytest` overrules the first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most tests compile more than they compute. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` tests what
# users run, and takes half as long again.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The threads of NumPy, SciPy and scikit-learn spin while they wait for a processor: with two
# workers on two, a factorization took 30 times as long as with one thread each. Programs under
# test inherit it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What one process compiles, the others need not: half of what the programs under test take.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="jaxpoison-tests-")  # removed at exit
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

from jaxpoison.core import devices

if jax.__version_info__ < (0, 11) and os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0":
    # XLA's newer way to emit fused loops takes twice as long to compile; later versions have no
    # other. Programs as small as these are compiled faster whole than in pieces side by side.
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    )
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", False)

# Tests leave many objects and little garbage: looking for it less often is enough.
gc.set_threshold(20_000, 20, 20)

# Files that run what users run, on the one device that a user's CPU is: eight that share two cores
# cost more (docs 64 s, digits 48 s; now 47 and 27). What more change is tested with each method.
ON_ONE_DEVICE = {"test_charvec_digits", "test_docs_pages", "test_readme"}

# What takes longest comes first, so that the two workers of `make test` end together.
LONGEST = (
    *("test_transfer_experiment", "test_hosts", "test_experiments", "test_benchmarks", "test_grid"),
    *("test_audit", "test_explain", "test_targeted", "test_pretrain", "test_all_defenses"),
    *("test_influence", "test_kronecker"),
    *("test_network", "test_transfer_attacks", "test_scratch_attacks", "test_solvers"),
    *("test_hint", "test_presets", "test_rivals", "test_controls", "test_checks"),
)

# What `make test-fast` runs: the doors, the readers and the rooms, and of each method the test that
# compares it with another source: a dense solve, the algorithm in NumPy, retraining.
FAST = {
    "test_attack_doors": (),  # the whole file
    "test_calibrate": (),
    "test_data": (),
    "test_detection": (),
    "test_house": (),
    "test_labels": (),
    "test_loops": (),
    "test_parallel": (),
    "test_runs": (),
    "test_sources": (),
    "test_attacks": ("test_budget_and_range",),
    "test_charvec_centroids": ("test_an_example_is_left_out_of_its_centroid_exactly",),
    "test_experiments": ("test_bad_settings_are_refused_before_any_work",),
    "test_grid": (
        "test_the_results_page_is_that_of_the_committed_results",
        "test_table_II_gives_mean_and_spread_and_marks_what_is_missing",
        "test_table_III_counts_targets_with_wilson_intervals",
    ),
    "test_hint": ("test_two_updates_equal_the_algorithm_in_numpy",),
    "test_influence": (
        "test_scores_and_pixel_maps_equal_explicit_derivatives",
        "test_scores_predict_leave_one_out_retraining",
    ),
    "test_solvers": ("test_solution_equals_dense_solve",),
    "test_training": (
        "test_optimizer_is_pytorchs_nesterov_sgd_with_milestones",
        "test_order_of_an_epoch_has_no_repeats_and_drops_the_remainder",
        "test_one_step_of_fit_is_a_step_along_the_gradient",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def mesh_by_default(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem in ON_ONE_DEVICE:
            every = devices.data_mesh
            patch.setattr(
                devices, "data_mesh", lambda given=None: every(given or jax.devices()[:1])
            )
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """Each program takes longer to make than the one before: MLIR looks through all that are kept.

    What two files share is in the cache on disk.
    """
    yield
    jax.clear_caches()


def pytest_collection_finish():
    gc.freeze()  # what is imported and collected stays until the end


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
    for item in items:
        tests = FAST.get(item.path.stem)
        if tests is not None and (not tests or item.originalname in tests):
            item.add_marker("fast")
