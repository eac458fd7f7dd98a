"""Runs the PyTorch libraries in a process of their own, in turn with ours.

pyDVL wants NumPy below 2 and JAX a newer one, so they may live in an environment of their own:

  python3 -m venv peers && peers/bin/pip install torch "pydvl[influence]" captum dattri
  python benchmarks/hvp.py --peers --peers-python peers/bin/python

Weights and images go over in one .npz, commands as lines of JSON, and answers come back in .npy,
flattened as `problem.flat` does, so that they can be compared with ours.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import measure
import numpy as np
from problem import DAMPING, Problem

LIBRARIES = ("torch.func", "pyDVL", "dattri", "captum")
# What `core.memory.keep_freed` does, for a process that has not got our package.
KEEPS_FREED = {
    "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1",
}  # fmt: skip


class Peers:
    """The process, or none: then there are no contenders. Use as a context manager.

    Attributes:
      versions: of Python, PyTorch and the libraries, as found in its environment.
    """

    def __init__(self, options: argparse.Namespace, problem: Problem, direction: Any):
        self._folder = Path(tempfile.mkdtemp())
        self.versions: dict[str, str] = {}
        self._worker = None
        if not available(options):
            return
        leaves = jax.tree_util.tree_leaves_with_path({"p": problem.params, "u": direction})
        arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        for name in ("train", "group"):
            images, labels = getattr(problem, name)
            arrays |= {f"{name} images": np.asarray(images), f"{name} labels": np.asarray(labels)}
        arrays["damping"] = np.asarray(DAMPING)
        np.savez(self._folder / "problem.npz", allow_pickle=False, **arrays)
        self._worker = Worker(options, "peers_worker.py", str(self._folder / "problem.npz"))
        self.versions = self._worker.ask(do="versions")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._worker:
            self._worker.end()
        shutil.rmtree(self._folder)

    def contenders(
        self, work: str, task: str, *, want: Any = None, items: int = 1, **settings: Any
    ) -> list[measure.Contender]:
        """Returns a contender for each library that is installed and does `task`.

        Args:
          work: as in `measure.Contender`.
          task: the name of the work in `peers_worker.py`.
          want: our answer; the relative difference of theirs is reported beside their times.
          items: as in `measure.Contender`.
          **settings: numbers that the task takes.
        """
        found, worker = [], self._worker
        if worker is None:
            return found
        for library in LIBRARIES:
            reply = worker.ask(do="prepare", task=task, library=library, settings=settings)
            if "absent" in reply:
                print(f"{work}: {library} left out: {reply['absent']}", flush=True)
            for name in reply.get("names", ()):
                path = self._folder / "answer.npy"
                reply = worker.ask(do="answer", name=name, path=str(path))
                facts, got = reply["facts"], np.load(path)
                fewer = reply["items"]  # than asked for, where a call would take too long
                if want is not None and (fewer or got.size == np.size(want)):
                    same = np.asarray(want)[:fewer]
                    facts["difference"] = measure.difference(got, same)

                def sample(repeats, name=name):
                    return worker.ask(do="sample", name=name, repeats=repeats)["seconds"]

                found.append(
                    measure.Contender(
                        work, name.partition("/")[2], sample, items=fewer or items, facts=facts
                    )
                )
        return found


class Worker:
    """A process of PyTorch's interpreter that answers lines of JSON with lines of JSON."""

    def __init__(self, options: argparse.Namespace, script: str, *arguments: str):
        path = Path(__file__).with_name(script)
        self._process = subprocess.Popen(
            [options.peers_python, str(path), *arguments],
            env=os.environ | KEEPS_FREED,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Returns the answer to a command."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries may print too
                return json.loads(line)
        raise RuntimeError(f"the peers' process ended at {command}; see its error above")

    def end(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait()


def available(options: argparse.Namespace) -> bool:
    """Returns whether PyTorch was asked for and is there, and prints why if it is not."""
    if not options.peers:
        return False
    if jax.default_backend() != "cpu":
        print("peers left out: they run on CPU, and this is another device")
        return False
    found = subprocess.run([options.peers_python, "-c", "import torch"], capture_output=True)
    if found.returncode:
        print(f"peers left out: {options.peers_python} cannot import torch", flush=True)
    return not found.returncode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that ask for peers."""
    parser.add_argument("--peers", action="store_true", help="measure the PyTorch libraries too")
    parser.add_argument(
        "--peers-python", default=sys.executable, help="interpreter that has them, if another one"
    )
