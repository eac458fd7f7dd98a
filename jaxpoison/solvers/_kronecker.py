"""Kronecker-factored approximations of H, to solve with and to precondition.

    x = (C + damping I)^-1 v,    C ~ H in blocks whose eigenvectors are known: K-FAC or EK-FAC

As Grosse et al. 2023 (arXiv:2308.03296) use it for influence; here the residual is measured with
H itself, the curvature between layers included, which C leaves out.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from jaxpoison.core.checks import check_positive, number, shortened
from jaxpoison.core.kronecker import KroneckerFactors
from jaxpoison.core.trees import LinearMap
from jaxpoison.solvers.base import NOT_MEASURED, Solver, Status, judge_noisy, solve_and_measure


def ekfac(factors: KroneckerFactors, *, damping: float, tolerance: float = 0.01) -> Solver:
    """Returns the direct solver of C + damping I, for C near H: one product, to measure.

    The damping is added to the eigenvalues of C, not split between factors, so the answer is exact
    where H is C. The residual is that of H, and tells how wrong C is for this right-hand side; for
    trained networks at small damping it may be above 1, and the status DIVERGED. Where that is not
    good enough, use `cg(preconditioner=kronecker_preconditioner(...))`, which gives the answer for
    H. Derivatives solve with C too.

    Two such solvers are equal if their factors are the same object.

    Args:
      factors: of `curvature.ekfac` or `curvature.kfac`, over the same parameters as the right-hand
        side.
      damping: added to the diagonal, in the units of H; positive.
      tolerance: it converges if the residual is at most this. Above, and up to 0.5, the answer is
        noisy but usable.

    Raises:
      TypeError: for something else than factors. ValueError: when it is called with a right-hand
        side over other parameters.
    """
    return _Ekfac(factors, number(damping), number(tolerance))


@dataclasses.dataclass(frozen=True)
class _Ekfac:
    factors: KroneckerFactors
    damping: Any
    tolerance: Any

    def __post_init__(self):
        _check_factors(self.factors)
        check_positive(damping=self.damping, tolerance=self.tolerance)

    def __call__(self, matvec, rhs, *, sample=None, key=None, progress=None):
        del sample, key, progress
        run = functools.partial(_run, self)
        judge = functools.partial(judge_noisy, self.tolerance)
        return solve_and_measure(matvec, rhs, self.damping, run, judge)


def _run(config, damped, v, loop):
    del damped, loop
    x = config.factors.solve(v, config.damping)
    none = jnp.asarray(NOT_MEASURED)
    return x, (jnp.zeros((), jnp.int32), jnp.asarray(int(Status.CONVERGED), jnp.int32), none)


def kronecker_preconditioner(factors: KroneckerFactors, *, damping: float) -> LinearMap:
    """Returns r -> (C + damping I)^-1 r for `cg(preconditioner=...)`.

    Two of them are equal if their factors are the same object and the dampings are equal, and so
    are two `cg` that hold them.

    Args:
      factors: as for `ekfac`.
      damping: that of `cg`, or a larger one: where C is far from H, 30 times as much took half as
        many products (`benchmarks/kronecker.py`).

    Raises:
      TypeError: for something else than factors.
    """
    return _Preconditioner(factors, number(damping))


@dataclasses.dataclass(frozen=True)
class _Preconditioner:
    factors: KroneckerFactors
    damping: Any

    def __post_init__(self):
        _check_factors(self.factors)
        check_positive(damping=self.damping)

    def __call__(self, r):
        return self.factors.solve(r, self.damping)


def _check_factors(factors):
    if not isinstance(factors, KroneckerFactors):
        raise TypeError(
            f"factors must be those of curvature.ekfac or curvature.kfac, got "
            f"{shortened(repr(factors))}"
        )
