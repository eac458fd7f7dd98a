"""The checks of an audit, in the order of the report."""

from jaxpoison.audit.checks import (
    centroids,
    copies,
    crosslabel,
    margins,
    neighbors,
    overlap,
)
from jaxpoison.audit.verdict import Check

CHECKS: tuple[Check, ...] = (
    copies.CHECK,
    overlap.CHECK,
    crosslabel.CHECK,
    neighbors.CHECK,
    margins.CHECK,
    centroids.CHECK,
)
"""All checks."""
