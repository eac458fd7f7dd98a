"""Inverse-curvature-vector products: x with (H + damping I) x = v, knowing only u -> H u.

`v` and `x` are pytrees shaped like the parameters; `damping` > 0 is in the units of H. Each
factory returns a solver `(matvec, rhs, *, sample, key, progress) -> Solution`:

    cg         conjugate gradients: the one to take when in doubt
    cholesky   writes H out: small last layers
    nystrom    a low-rank sketch of H: many right-hand sides, moderate accuracy
    ekfac      the inverse of a Kronecker-factored approximation of H: whole networks, one product
    arnoldi    the top eigenvectors of H alone: what Schioppa et al. use for large networks
    lissa      a stochastic Neumann series: what the papers used
    identity   H = I: the ablation

Inside `jit` a solver cannot raise, so it returns evidence with its answer; `require_converged`
turns that into an error on the host, and `require_usable` lets noisy answers pass. Two solvers of
the same settings are equal, so that a `jit` with a static solver compiles once for both. All may be
differentiated, by the implicit function theorem: a derivative is one more solve with the same
solver, not a walk back through the iterations. Outside `jit`, on CPU, the host drives them.

Many right-hand sides are a `jax.vmap` over `rhs` (or over the groups of `influence.group_ihvp`):
products are then taken for all of them together, and what does not depend on `rhs`, such as a
factorization or a sketch, is computed once. `spectrum` shows which damping and scale make sense.
"""

from jaxpoison.solvers._arnoldi import arnoldi as arnoldi
from jaxpoison.solvers._cg import cg as cg
from jaxpoison.solvers._cholesky import cholesky as cholesky
from jaxpoison.solvers._kronecker import ekfac as ekfac
from jaxpoison.solvers._kronecker import kronecker_preconditioner as kronecker_preconditioner
from jaxpoison.solvers._lissa import lissa as lissa
from jaxpoison.solvers._lissa import lissa_from_authors as lissa_from_authors
from jaxpoison.solvers._nystrom import nystrom as nystrom
from jaxpoison.solvers._nystrom import nystrom_preconditioner as nystrom_preconditioner
from jaxpoison.solvers._spectrum import Spectrum as Spectrum
from jaxpoison.solvers._spectrum import power_iteration as power_iteration
from jaxpoison.solvers._spectrum import spectrum as spectrum
from jaxpoison.solvers.base import DivergedError as DivergedError
from jaxpoison.solvers.base import Solution as Solution
from jaxpoison.solvers.base import Solver as Solver
from jaxpoison.solvers.base import Status as Status
from jaxpoison.solvers.base import identity as identity
from jaxpoison.solvers.base import require_converged as require_converged
from jaxpoison.solvers.base import require_usable as require_usable
