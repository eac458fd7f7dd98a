"""Two processes on this machine, as on two hosts: the same numbers as one, and one set of files."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import problems
import pytest
from programs import squeezed

from jaxpoison import attacks, curvature, data, influence, models, runs, solvers
from jaxpoison.core import devices, hosts

ROOT = Path(__file__).parents[1]
SLURM_PORTS = 65535 - 2**12 + 1  # the first of them
SECONDS = 300  # a hang fails after so long; on two quiet cores each test takes a tenth of it
TINY = (
    *("--preset", "quick", "--train-examples", "64", "--recipe.batch-size", "32"),
    *("--test-examples", "1000", "--trusted-examples", "64"),
    *("--recipe.epochs", "4", "--hint.schedule", "1", "--trusted-epochs", "1"),
    *("--recipe.learning-rate", "0.01", "--recipe.momentum", "0"),  # rounding is not carried on
    *("--attacks", "durp", "pgd", "--defenses", "hint", "--checkpoint-every", "1"),
)


def start(commands, cwd, num_devices=2, variables=({}, {})):
    """Starts processes, each with its own variables; their output goes to files in `cwd`."""
    # A proxy would not find the way back to this machine.
    inherited = {name: os.environ[name] for name in os.environ if "_proxy" not in name.lower()}
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "COLUMNS": "200",
    }
    started = []
    for index, (command, own) in enumerate(zip(commands, variables, strict=False)):
        with (cwd / f"{index}.out").open("w") as out, (cwd / f"{index}.err").open("w") as err:
            started.append(
                subprocess.Popen(
                    command, stdout=out, stderr=err, env=inherited | environment | own, cwd=cwd
                )
            )
    return started


def wait(started, cwd):
    """Returns the exit statuses and, of each process, what it printed and what it complained."""
    deadline = time.monotonic() + SECONDS
    try:
        statuses = [process.wait(max(0, deadline - time.monotonic())) for process in started]
    except subprocess.TimeoutExpired:
        pytest.fail("a process hangs\n" + "\n".join(e.read_text() for e in cwd.glob("*.err")))
    finally:
        for process in started:
            process.kill()
    texts = [
        tuple((cwd / f"{index}.{kind}").read_text() for kind in ("out", "err"))
        for index in range(len(started))
    ]
    return statuses, texts


def free_port():
    """Returns a port of those that JAX would choose from on SLURM."""
    while True:
        port = random.randrange(SLURM_PORTS, 65535)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def experiment(run_dir, *flags):
    script = ROOT / "experiments" / "mnist_hint.py"
    return [sys.executable, str(script), "--run-dir", str(run_dir), *TINY, *flags]


def experiment_of_two(run_dir, *flags):
    address = f"127.0.0.1:{free_port()}"
    together = ("--coordinator", address, "--num-processes", "2", "--process-id")
    return [experiment(run_dir, *flags, *together, process) for process in ("0", "1")]


def slurm_tasks():
    """Returns the variables that SLURM gives to two tasks on this machine."""
    job = {
        "SLURM_JOB_ID": str(free_port() - SLURM_PORTS),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    return [job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]


# Influence on data of which each process has loaded its own half.

CASES = {
    "head": (problems.softmax_head, solvers.cg(damping=0.1)),
    "network": (problems.small_network, solvers.cg(damping=0.1)),
    # Draws batches from the examples of both processes.
    "lissa": (problems.softmax_head, solvers.lissa(damping=0.5, num_steps=100, batch_size=16)),
}


def influences(problem_fn, solver, place):
    """Returns s, scores, pixel maps and the residual, with `place` applied to the data sets."""
    problem = problem_fn()
    gauss_newton = curvature.gauss_newton(problem.output_fn, problem.output_loss)

    @jax.jit
    def compute(params, group, train, key):
        s = influence.group_ihvp(
            problem.loss_fn, params, group, train, solver=solver, curvature=gauss_newton, key=key
        )
        scores = influence.example_influence(problem.loss_fn, params, s.value, train)
        maps = influence.pixel_influence(problem.loss_fn, params, s.value, train)
        return problems.ravel_pytree(s.value)[0], scores, maps, s.residual

    group, train = place(problem.group), place(problem.train)
    return compute(problem.params, group, train, jax.random.key(0))


def clean_network():
    """Returns the MNIST CNN with weights drawn from a key, and images and labels to attack."""
    model, train = models.mnist_cnn(), data.load_embedded("mnist").train
    images, labels = data.to_float(train.images[:64]), jax.numpy.asarray(train.labels[:64])
    return (model, model.init(jax.random.key(0), images)), images, labels


def craft(num_steps):
    """Returns PGD's images after some steps, crafted on all devices of all processes."""
    attack = attacks.pgd(epsilon=0.3, num_steps=num_steps)
    return devices.to_host(attack.craft(jax.random.key(1), *clean_network()))


def child(address, process_id, folder):
    """What each process does: rank and size from the command line, results to `folder`."""
    hosts.SHARED_SECONDS = 0.5
    rank, folder = int(process_id), Path(folder)
    with hosts.processes(address, 2, rank):
        assert (hosts.process_count(), hosts.is_main()) == (2, rank == 0)
        mesh = devices.data_mesh()
        assert mesh.size == 2 * jax.local_device_count() == 4
        results = {}
        for name, (problem_fn, solver) in CASES.items():
            for value, array in zip(
                ("s", "scores", "maps", "residual"),
                influences(problem_fn, solver, lambda tree: join_halves(tree, mesh, rank)),
                strict=True,
            ):
                results[f"{name} {value}"] = devices.to_host(array)
        results |= {f"crafted {steps}": craft(steps) for steps in (1, 10)}
        check_placement(mesh, rank)
        check_errors_reach_all(mesh, rank)
        with pytest.raises(ValueError, match=r"process 1: .* other settings .* beta: 1; .* 0"):
            runs.Run(folder / "run", {"alpha": 5, "beta": rank})
        assert not (folder / "run").exists()
        with pytest.raises(ValueError, match=r"process 1: .* does not show a file"):
            runs.Run(folder / f"run-{rank}", {"beta": 0})
        hosts.on_main(lambda: np.savez(folder / "results.npz", **results))
        assert (folder / "results.npz").exists()


def join_halves(tree, mesh, rank):
    """Places arrays from what a process has read by itself: rows of its own half."""
    size = jax.tree.leaves(tree)[0].shape[0] // 2
    own = jax.tree.map(lambda x: np.asarray(x)[rank * size :][:size], tree)
    joined = devices.join_examples(own, mesh)
    for array, whole in zip(jax.tree.leaves(joined), jax.tree.leaves(tree), strict=True):
        assert not array.is_fully_addressable
        np.testing.assert_array_equal(devices.to_host(array), whole)
    return joined


def check_placement(mesh, rank):
    rows = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    tree = {"np": rows, "jax": jax.numpy.asarray(rows), "key": jax.random.split(jax.random.key(0))}
    copies = devices.replicate(tree, mesh)
    assert jax.random.bits(copies["key"][1]) == jax.random.bits(tree["key"][1])
    assert devices.replicate(copies, mesh)["np"] is copies["np"]
    shards = devices.shard_examples(rows, mesh)
    assert {s.data.shape for s in shards.addressable_shards} == {(2, 2)}
    for array in (copies["np"], copies["jax"], shards, devices.replicate(shards, mesh), rows):
        np.testing.assert_array_equal(devices.to_host(array), rows)
    local = devices.data_mesh(jax.local_devices())  # of this process alone: nobody is asked
    np.testing.assert_array_equal(devices.replicate(rows + rank, local), rows + rank)


def check_errors_reach_all(mesh, rank):
    assert hosts.on_main(lambda: {"rank": rank}) == {"rank": 0}
    assert hosts.on_all(lambda: rank) == rank

    def fail(error):
        raise error

    def fail_on_one(error):
        return fail(error) if rank == 1 else None

    with pytest.raises(PermissionError, match="no"):
        hosts.on_main(lambda: fail(PermissionError("no")))
    with pytest.raises(ValueError, match=r"process 1: .*column"):  # a kind that takes three values
        hosts.on_all(lambda: fail_on_one(json.JSONDecodeError("bad", "text", 0)))
    with pytest.raises(ValueError, match="other values in process 1 than in process 0"):
        devices.replicate(np.full(3, rank), mesh)
    for place in (devices.shard_examples, devices.join_examples):
        with pytest.raises(ValueError, match="does not divide by"):
            place(np.zeros(7), mesh)


@pytest.fixture(scope="module")
def over_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("influence")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_hosts; test_hosts.child"
    address, here = f"127.0.0.1:{free_port()}", str(Path(__file__).parent)
    commands = [
        [sys.executable, "-c", f"{code}(*sys.argv[2:])", here, address, rank, str(folder)]
        for rank in ("0", "1")
    ]
    statuses, texts = wait(start(commands, folder), folder)
    assert statuses == [0, 0], texts
    return dict(np.load(folder / "results.npz"))


@pytest.mark.parametrize("case", CASES)
def test_influence_over_two_processes_is_that_of_one(over_two_processes, case):
    one = influences(*CASES[case], lambda tree: tree)
    for name, want in zip(("s", "scores", "maps"), one, strict=False):
        assert problems.relative_error(over_two_processes[f"{case} {name}"], want) < 1e-5
    if case != "lissa":
        assert over_two_processes[f"{case} residual"] < 1e-5


def test_poisons_crafted_by_two_processes_are_those_of_one(over_two_processes):
    # A gradient's sign may turn at a pixel where it is zero but for rounding.
    moved = np.abs(over_two_processes["crafted 1"] - craft(1)) > 1e-5
    assert np.mean(moved) < 1e-3
    # Each step's signs decide where the next gradient is taken, so after ten steps rounding has
    # turned up to a tenth of the pixels; what the attack attains does not depend on that.
    (model, variables), images, labels = clean_network()

    def gain(x):
        losses = [problems.cross_entropy(model.apply(variables, y), labels) for y in (x, images)]
        return float(jax.numpy.mean(losses[0] - losses[1]))

    crafted, wanted = over_two_processes["crafted 10"], craft(10)
    assert np.abs(crafted - images).max() < 0.3 + 1e-6
    assert gain(wanted) > 2 * gain(craft(1)) > 0
    np.testing.assert_allclose(gain(crafted), gain(wanted), rtol=0.05)


# A whole experiment, from the command line.


@pytest.fixture(scope="module")
def one(tmp_path_factory, two):
    """The run folder of one process on one device, which finds the poisons of the two.

    Of its own they would differ, by rounding that ten steps of signs carry on: see above.
    """
    folder = tmp_path_factory.mktemp("one")
    shutil.copytree(two[0] / "poisons", folder / "run" / "poisons")
    statuses, texts = wait(start([experiment(folder / "run")], folder, num_devices=1), folder)
    assert statuses == [0], texts
    return folder / "run"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The run folder and the output of two processes, of which one died once."""
    folder = tmp_path_factory.mktemp("two")
    started = start(experiment_of_two(folder / "run"), folder)
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    # After HINT's update, which the next start must find in the checkpoint.
    while time.monotonic() < deadline and all(process.poll() is None for process in started):
        if metrics.exists() and '"cell": "seed0-p1-hint", "epoch": 2' in metrics.read_text():
            started[1].send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    statuses, texts = wait(started, folder)
    assert statuses[1] == -signal.SIGKILL, texts
    assert statuses[0] not in (0, -signal.SIGKILL), texts  # it ended by itself
    again = [experiment(folder / "run", "--distributed")] * 2
    statuses, texts = wait(start(again, folder, variables=slurm_tasks()), folder)
    assert statuses == [0, 0], texts
    return folder / "run", texts


def metrics_of(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {(line.pop("cell"), line.pop("epoch")): line for line in lines}


def test_an_experiment_of_two_processes_killed_and_continued_gives_the_numbers_of_one(one, two):
    wanted, got = metrics_of(one), metrics_of(two[0])
    assert got.keys() == wanted.keys()
    for line, want in wanted.items():
        for name in want.keys() - {name for name in want if name.endswith("seconds")}:
            # Sums are taken in another order, and sixteen steps of training carry that on.
            tolerance = 2e-3 if name.endswith("accuracy") else 1e-4 * abs(want[name])
            if name != "residual":
                assert got[line][name] == pytest.approx(want[name], abs=tolerance), (line, name)
    update = got["seed0-p1-hint", 1]
    assert update["residual"] < 1e-5
    assert update["poison_recall"] == 0.5


def test_one_set_of_files_is_written_and_one_process_prints(one, two):
    def files(run_dir):
        paths = (path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file())
        return sorted(str(path) for path in paths if path.parts[0] != "checkpoints")

    run_dir, ((printed, _), (silent, _)) = two
    assert files(run_dir) == files(one)
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {
        path.name for path in (one / "checkpoints").iterdir()
    }
    rows = {path: json.loads((path / "result.json").read_text()) for path in (one, run_dir)}
    assert rows[run_dir]["environment"]["processes"] == 2
    assert rows[run_dir]["config"] == rows[one]["config"]
    assert len(rows[run_dir]["rows"]) == len(rows[one]["rows"]) == 3
    assert "| 1 | HINT |" in squeezed(printed) and "picture" in printed
    # XLA's transport between CPUs prints a line for each device, in pieces that may mingle.
    gloo = "[Gloo] Rank is connected to peer ranks. Expected number of :"
    assert set(re.findall(r"[^\s\d.:\[\]]+|\d\.\d", silent)) <= set(re.findall(r"\w+", gloo))


def test_a_batch_that_does_not_divide_is_refused_by_all_before_any_work(tmp_path):
    flags = ("--recipe.batch-size", "34")
    statuses, texts = wait(start(experiment_of_two(tmp_path / "run", *flags), tmp_path), tmp_path)
    assert 0 not in statuses
    assert "a batch of 34 examples does not divide by 4 devices" in texts[0][1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
