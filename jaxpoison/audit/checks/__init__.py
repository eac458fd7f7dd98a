"""The checks of an audit, in the order of the report."""

from jaxpoison.audit.checks import (
    centroids,
    characteristic,
    clustering,
    confident,
    copies,
    crosslabel,
    early,
    foreign,
    layers,
    margins,
    neighbors,
    noise,
    odd,
    overlap,
    shortcuts,
    spectral,
    witnesses,
)
from jaxpoison.audit.verdict import Check

CHECKS: tuple[Check, ...] = (
    odd.CHECK,
    copies.CHECK,
    overlap.CHECK,
    crosslabel.CHECK,
    shortcuts.CHECK,
    neighbors.CHECK,
    foreign.CHECK,
    margins.CHECK,
    confident.CHECK,
    witnesses.CHECK,
    centroids.CHECK,
    characteristic.CHECK,
    layers.CHECK,
    spectral.CHECK,
    clustering.CHECK,
    noise.CHECK,
    early.CHECK,
)
"""All checks."""
