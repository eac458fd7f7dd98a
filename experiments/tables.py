"""The paper's tables II to V with our numbers next to the paper's, as Markdown
and as LaTeX.

  python experiments/tables.py        # writes docs/results.md, docs/threats.md
  python experiments/tables.py --results runs --out runs/results.md \\
      --latex runs/tables.tex

Everything comes from results files, `*/result.json` in the folder of results.
`notes.md` next to one has in words what to make of it, and `notes.md` in the
folder of results what to make of them all; `transfer_filter.py` has written its
report next to its own. The page of threats looks up the experiments that it
is about by their names, and is made of the committed results alone.
"""

import argparse
from pathlib import Path

from common import page, threats

from jaxpoison import runs
from jaxpoison.core.files import write_text

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "experiments" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=COMMITTED)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--latex", type=Path, help="also write the tables as LaTeX, to this file")
    options = parser.parse_args()
    with runs.program(options.out.parent):
        found = list(page.results(options.results))
        if not found:
            parser.error(f"no result.json with tables in the folders of {options.results}")
        write_text(options.out, page.page(options.results, options.out.parent))
        runs.say(f"{options.out}: {', '.join(path.parent.name for path, _ in found)}")
        if options.results == COMMITTED:
            write_text(ROOT / "docs" / "threats.md", threats.page(COMMITTED, ROOT / "docs"))
        if options.latex is not None:
            write_text(options.latex, page.latex(options.results))
            runs.say(str(options.latex))


if __name__ == "__main__":
    main()
