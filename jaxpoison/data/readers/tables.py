"""Tables of path and label as text: .csv, with commas, semicolons or tabs between the fields."""

import csv
from pathlib import Path

from jaxpoison.data.readers import columns
from jaxpoison.data.readers.source import Source


def open_csv(
    path: Path,
    root: Path,
    *,
    image_column: str | None,
    label_column: str | None,
    follow_links: bool,
    max_pixels: int,
) -> Source:
    """Returns the images that a table names; its first line has the names of the columns.

    Bytes that are not UTF-8 are kept, since names of files may have them.

    Args:
        path: the table.
        root: the folder that paths are relative to.
        image_column, label_column: names of columns, or None for the usual ones.
        follow_links: see `columns.safe_path`.
        max_pixels: see `decode.decode`.

    Raises:
        ValueError: if there are no such columns, no rows, or the file is no table.
    """
    paths, values, reasons = [], [], {}
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.readline(1 << 16)
            file.seek(0)
            delimiter = max(",;\t", key=first.count)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            image = header.index(
                columns.choose(
                    header, image_column, columns.IMAGE_COLUMNS, "image_column", str(path)
                )
            )
            label = header.index(
                columns.choose(
                    header, label_column, columns.LABEL_COLUMNS, "label_column", str(path)
                )
            )
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    reasons[len(paths)] = (
                        f"Line {reader.line_num} has {len(fields)} fields, not {len(header)}."
                    )
                paths.append(fields[image] if image < len(fields) else None)
                values.append(fields[label] if label < len(fields) else None)
    except csv.Error as error:
        raise ValueError(f"{path} is no table that can be read: {error}") from error
    return columns.source_of_paths(
        paths,
        values,
        root=root,
        names=None,
        reasons=reasons,
        name=str(path),
        kind="a table of paths",
        follow_links=follow_links,
        max_pixels=max_pixels,
    )
