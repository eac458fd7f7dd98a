"""Runs the Python blocks of a page, in order and with shared names, as a notebook would.

  python docs/execute.py docs/walk-through.md

What a block prints stands in the ```text block that follows it. This command
writes those blocks again, and copies the pictures that the page shows from
where its code has saved them. `tests/test_docs_pages.py` compares instead.
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```\n(\n```text\n(.*?)^```\n)?", re.M | re.S)
PICTURE = re.compile(r"!\[[^]]*\]\(([\w-]+\.png)\)")


def execute(page: Path, folder: Path) -> list[tuple[str | None, str]]:
    """Runs a page in a folder; returns what each block should print, None for nothing, and does."""
    results, names = [], {"__name__": page.stem}
    with contextlib.chdir(folder):
        for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
            code, _, expected = match.groups()
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(page), "exec"), names)  # this repository's own text
            results.append((expected, printed.getvalue()))
    return results


def rewrite(page: Path) -> None:
    """Runs a page, and writes what its blocks print and draw into it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outputs = iter([printed for _, printed in execute(page, folder)])

        def written(match):
            printed = next(outputs)
            shown = f"\n```text\n{printed}```\n" if printed else ""
            return f"```python\n{match[1]}```\n{shown}"

        text = page.read_text(encoding="utf-8")
        page.write_text(BLOCK.sub(written, text), encoding="utf-8")
        for picture in PICTURE.findall(text):
            if (folder / picture).exists():
                shutil.copyfile(folder / picture, page.parent / picture)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", type=Path, nargs="+")
    for page in parser.parse_args().pages:
        rewrite(page.resolve())


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
