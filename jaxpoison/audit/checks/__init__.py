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
    held_out,
    layers,
    margins,
    marks,
    neighbors,
    noise,
    odd,
    overlap,
    overlays,
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
    held_out.CHECK,
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
    marks.CHECK,
    overlays.CHECK,
    early.CHECK,
)
"""All checks."""
