"""A report as an audit of CIFAR-10 images could write it: real images, invented findings."""

import dataclasses

import numpy as np

from jaxpoison.audit import findings
from jaxpoison.data import load_embedded

HOSTILE = (
    "cat/<script>alert(1)</script>.png",
    'cat/"quoted\' onload=alert(1) x=".png',
    "dog/two\nlines\rand\u2028more.png",
    "dog/caf\\xe9 of bytes.png",
    "frog/\u202egnp.exe\u202c.png",
    "=cmd|' /C calc'!A0",
    "ship/{{ 7*7 }} & </li></ol>.png",
    "__proto__",
    "horse/長い名前-" + "x" * 180 + ".png",
)
CHECKS = (
    findings.CheckResult(
        "files", "Broken and odd files", "file", "ran", "Decides by rule.",
        "Images that are well-formed and wrong.", 1,
    ),
    findings.CheckResult(
        "copies", "The same image under two labels", "copy", "ran", "Decides by rule.",
        "Copies that were cropped, mirrored or recolored.", 4,
    ),
    findings.CheckResult(
        "neighbors", "Neighbors disagree", "label", "ran", "",
        "Wrong labels between classes that the embedding cannot tell apart.", 21, 0.71,
    ),
    findings.CheckResult(
        "margins", "Margins over training", "label", "ran", "",
        "Wrong labels that the network memorizes in its first epoch.", 17, 0.632,
    ),
    findings.CheckResult(
        "witnesses", "Only the foreign witness disagrees", "poison", "ran", "",
        "Poisons whose features fool the foreign embedding as well.", 9, 0.884,
    ),
    findings.CheckResult(
        "linear", "Shortcuts for linear networks", "shortcut", "ran", "Decides on the whole set.",
        "Shortcuts that need more than two layers.", 0,
    ),
    findings.CheckResult(
        "overlap", "Also a trusted image", "copy", "not run",
        "It needs trusted images: give five or more a class with --trusted.",
        "Copies that were cropped.",
    ),
)  # fmt: skip
POWER = (
    findings.Power("flip", "Labels changed at random", 50, 46, 3.9,
                   {"neighbors": 0.84, "margins": 0.9}),
    findings.Power("copy", "Images copied into another class", 50, 50, 0.0, {"copies": 1.0}),
    findings.Power("patch", "A patch in the corner, relabeled", 50, 39, 4.2,
                   {"neighbors": 0.7, "witnesses": 0.62, "margins": 0.04}),
    findings.Power("blend", "A faint pattern, relabeled", 50, 14, 4.2,
                   {"neighbors": 0.2, "witnesses": 0.24},
                   "Found where the pattern covers the object."),
    findings.Power("collision", "Feature collisions with clean labels", 50, 1, 4.2,
                   {"neighbors": 0.02, "witnesses": 0.02}),
    findings.Power("classwise", "A faint pattern for each class", 1, 1, 0.0, {"linear": 1.0},
                   whole=True),
    findings.Power("deep", "A pattern that only deep networks see", 0, 0, 0.0, {},
                   "Too few images a class."),
)  # fmt: skip
WORTH = findings.Worth(
    (
        findings.WorthRow("without", "Without what was flagged", 0.012, 0.004, 0.02, 5),
        findings.WorthRow("random", "Without as many at random", -0.001, -0.009, 0.007, 5),
        findings.WorthRow("jpeg", "Through JPEG", -0.021, -0.03, -0.012, 5),
    ),
    "Leave out what was flagged.",
    "It measured best, and its interval is above zero.",
)
CERTIFICATE = findings.Certificate(
    50, 500, 0.76,
    (findings.CertificateRow(1, 0.93, 0.72), findings.CertificateRow(20, 0.1, 0.1)),
    "Of 50 linear classifiers the majority is right on 76% of 500 trusted images.",
)  # fmt: skip
_FAULTS = (
    ("label", ("neighbors", "margins"), "{} of its 10 nearest neighbors are '{}'."),
    ("poison", ("witnesses",), "The foreign witness sees '{1}' ({0} of 10 neighbors), the trained one believes the label."),  # noqa: E501
    ("copy", ("copies",), "The same image is in '{1}' as well; {0} pixels differ."),
    ("label", ("neighbors",), "{} of its 10 nearest neighbors are '{}'."),
)  # fmt: skip


def sample(number: int = 36, *, hostile: bool = False) -> findings.Report:
    """Returns a report of 2,500 images with `number` findings and two unreadable files."""
    train = load_embedded("cifar10").train
    names = load_embedded("cifar10").class_names
    images, labels = np.asarray(train.images), np.asarray(train.labels)
    ids = [f"{names[label]}/{row:05}.png" for row, label in enumerate(labels)]
    rng = np.random.default_rng(5)
    rows = rng.choice(len(labels), number, replace=False)
    given = (labels[rows] + rng.integers(1, 10, number)) % 10
    found, pictures = [], {}
    for rank, (row, label) in enumerate(zip(rows.tolist(), given.tolist(), strict=True)):
        kind, checks, reason = _FAULTS[rank % len(_FAULTS)]
        related = np.flatnonzero(labels == labels[row])[rank : rank + 1 + rank % 5].tolist()
        pictures |= {
            ids[other]: findings.Picture(names[labels[other]], findings.thumbnail(images[other]))
            for other in related
        }
        confidence = round(0.998 - 0.4 * rank / number, 3)
        reasons = [reason.format(10 - rank % 4, names[labels[row]])]
        if kind == "label" and rank % 3 == 0:
            reasons.append("The network trained on this data never believed the label.")
        own = HOSTILE[rank] if hostile and rank < len(HOSTILE) else f"{names[label]}/{row:05}.png"
        found.append(
            findings.Finding(
                id=own, row=row, class_name=names[label], kind=kind,
                severity="high" if kind == "poison" else ("medium", "low")[rank % 2],
                confidence=confidence,
                p_value=None if kind == "copy" else round(1e-5 * 1.3**rank, 9) % 1,
                q_value=None if kind == "copy" else round(1e-4 * 1.2**rank, 9) % 1,
                checks=checks, reasons=tuple(reasons), suggested=names[labels[row]],
                related=tuple(ids[other] for other in related),
                decision="confirmed" if rank == 2 else None,
                thumbnail=findings.thumbnail(images[row]),
            )
        )  # fmt: skip
    pattern = rng.integers(0, 256, (16, 40, 3)).astype(np.uint8)
    return findings.Report(
        data=findings.Data(
            source="photos/<b>'24</b>" if hostile else "/data/photos",
            num_images=len(labels), num_classes=10, class_names=names,
            class_counts=tuple(np.bincount(labels, minlength=10).tolist()),
            num_unreadable=2, fingerprint="3f" * 32,
        ),
        verdict="review",
        summary=(
            f"{number} of 2,500 images are flagged; as many wrong labels as expected by chance would be 10.",  # noqa: E501
            "Nine look like poisons: two networks disagree on them.",
        ),
        checks=CHECKS, findings=tuple(found),
        problems=(
            findings.Unreadable("cat/0001.png", "The file is empty."),
            findings.Unreadable("dog/<i>huge</i>.png", "It claims 60,000 x 60,000 pixels."),
        ),
        wholes=(
            findings.Conclusion(
                "linear", False, 0.12, "A linear network on half of the images reaches 31% on the "
                "other half; honest data of this kind allow 40%.", findings.thumbnail(pattern),
                "Its weights: what a shortcut would look like.",
            ),
        ),
        power=POWER, worth=WORTH, certificate=CERTIFICATE,
        ask=tuple(finding.id for finding in found[-6:]),
        pictures=pictures, config={"quick": False, "seed": 0, "trusted": None, "size": [32, 32]},
        replay="jaxpoison audit /data/photos --seed 0",
    )  # fmt: skip


def page(report, folder, **options):
    """Writes a report and returns its page."""
    findings.write(report, folder, ids=(), **options)
    return (folder / "report.html").read_text()


def changed(record, **fields):
    """Returns a record with some fields changed."""
    return dataclasses.replace(record, **fields)
