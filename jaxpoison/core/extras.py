"""Packages that not every installation has."""

import importlib
from typing import Any


def require(module: str, *, extra: str, otherwise: str = "") -> Any:
    """Returns the imported `module`, or raises an error that names the extra that provides it.

    Args:
      module: dotted name, such as "matplotlib.pyplot".
      extra: the extra in pyproject.toml, such as "experiments".
      otherwise: what else would help, for the end of the message.

    Raises:
      ImportError: if it cannot be imported; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} cannot be imported ({error}): pip install 'jaxpoison[{extra}]'{otherwise}",
            name=error.name,
        ) from error
