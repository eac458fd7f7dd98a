"""Pictures of a run (matplotlib): drawn without a screen, written whole or not at all."""

from pathlib import Path
from typing import Any

from jaxpoison.core.files import replacing
from jaxpoison.runs.extras import require_extra

_SIGNATURE, _END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def pyplot() -> Any:
    """Returns `matplotlib.pyplot`, drawing to files.

    Raises:
      ImportError: without matplotlib; names the extra that brings it.
    """
    require_extra("experiments", "matplotlib")
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path, **options: Any) -> None:
    """Writes a figure as PNG and closes it; `options` are those of its `savefig`."""
    with replacing(path) as file:
        figure.savefig(file, format="png", **options)
    pyplot().close(figure)


def is_whole(path: Path) -> bool:
    """Returns whether there is a PNG, from its first bytes to its last."""
    if not path.exists():
        return False
    content = path.read_bytes()
    return content.startswith(_SIGNATURE) and content.endswith(_END)
