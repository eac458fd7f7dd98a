"""The results page: notes, tables and pictures of all results files of a folder."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import tables
from jaxpoison import runs


def page(folder: Path, where: Path) -> str:
    """Returns the results page, to stand in `where`: notes on all, then each results file."""

    def link(path):
        return Path(os.path.relpath(path, where)).as_posix()

    parts = [
        "# Results",
        "",
        "Made by `python experiments/tables.py` from the files in "
        f"[{folder.name}]({link(folder)}); do not edit. Accuracy is that after the "
        "last epoch, mean ± standard deviation over seeds. The paper is HINT, arXiv 2309.08549: "
        "full sets, 5 trials, and a mixture of PGD, DAP, DURP and DeepConfuse.",
        "",
    ]
    found = list(results(folder))
    parts += _notes(folder)
    parts += [*(f"- [{path.parent.name}](#{path.parent.name})" for path, _ in found), ""]
    for path, result in found:
        parts += [f"## {path.parent.name}", ""]
        parts += _notes(path.parent)
        if tables.kind(result) in (tables.TRANSFER, tables.PRETRAINING):
            report = path.with_name("table.md")
            parts += [summary(report.read_text()), f"[All numbers]({link(report)})", ""]
        parts += [table.markdown() for table in tables.tables_of(result)]
        for row in result["rows"]:
            if "error" in row:
                name = tables.label(row["defense"])
                cell = f"seed {row['seed']}, p = {row['poison_ratio']:g}, {name}"
                parts += [f"Failed: {cell}: {row['error']}", ""]
        for picture in sorted(path.parent.glob("*.png")):
            parts += [f"![{picture.stem}]({link(picture)})", ""]
    return "\n".join(parts)


def latex(folder: Path) -> str:
    """Returns all tables of a folder of results as LaTeX."""
    found = [table for _, result in results(folder) for table in tables.tables_of(result)]
    return "\n".join(table.latex() for table in found)


def summary(report: str) -> str:
    """Returns what a program has written, less its longest table, one level deeper."""
    sections = [part for part in report.split("\n## ") if not part.startswith("All numbers")]
    return "\n### ".join(sections).strip() + "\n"


def results(folder: Path) -> Iterable[tuple[Path, dict[str, Any]]]:
    """Yields the results files of a folder that the page has something to show of."""
    for path in sorted(folder.glob("*/result.json")):
        result = runs.read_json(path)
        own = tables.kind(result) in (tables.TRANSFER, tables.PRETRAINING)
        if tables.tables_of(result) or own:
            yield path, result


def _notes(folder):
    """Returns what a folder's notes say, if it has any."""
    path = folder / "notes.md"
    return [path.read_text().strip(), ""] if path.exists() else []
