"""Packages that only an extra of this one brings."""

import importlib.util


def require_extra(extra: str, *packages: str) -> None:
    """Checks that packages are installed, without importing them.

    Args:
      extra: the extra of jaxpoison that brings them.
      packages: names as they are imported, e.g. `sklearn`.

    Raises:
      ImportError: if some are missing; names them and the extra.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'{", ".join(missing)} not installed: pip install "jaxpoison[{extra}]"',
            name=missing[0],
        )
