"""Defenses against poisoned training data, in JAX.

`from jaxpoison import influence, solvers` for the influence engine alone (pure JAX);
`jaxpoison.defenses`, `jaxpoison.attacks`, `jaxpoison.training`, `jaxpoison.models` and
`jaxpoison.data` for the experiments. Importing the package imports none of them.
"""

__version__ = "0.1.0"
