"""Tables as text, drawn by rich: Markdown for documents, columns for a terminal."""

import io
from collections.abc import Collection, Iterable, Sequence

_WIDE = 100_000  # characters: cells are never wrapped


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table: the header, a line of dashes, and a line for each row.

    Args:
      header: names of the columns.
      rows: cells, as many in each row as there are columns.

    Raises:
      ValueError: for a row with more or fewer cells.
    """
    from rich import box
    from rich.table import Table

    escaped = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return _drawn(Table(*header, box=box.MARKDOWN), escaped)


def columns(rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Returns lines of aligned cells for a terminal, indented by two spaces.

    Args:
      rows: cells, as many in each row.
      right: indices of the columns to be aligned on the right.

    Raises:
      ValueError: for rows of different lengths.
    """
    from rich.table import Table

    rows = list(rows)
    table = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
    for index in range(len(rows[0]) if rows else 0):
        table.add_column(justify="right" if index in right else "left")
    return _drawn(table, rows)


def _drawn(table, rows):
    from rich.console import Console
    from rich.text import Text

    for row in rows:
        if len(row) != len(table.columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(table.columns)}: {row}")
        table.add_row(*map(Text, row))
    page = io.StringIO()
    Console(file=page, width=_WIDE, color_system=None, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()).strip("\n")
