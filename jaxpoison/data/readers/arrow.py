"""What Parquet and Arrow have in common: features, columns, and images inside of a column."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpoison.core.extras import require
from jaxpoison.data.readers import columns
from jaxpoison.data.readers.contents import Content, Unreadable
from jaxpoison.data.readers.source import Images, Problem, Source


class Columns(NamedTuple):
    """Where images and labels are.

    Attributes:
        image: name of a column of bytes, of structs {bytes, path}, or of paths.
        label: name of a column.
        class_names: of the labels, where the file has them.
        has_bytes: whether images are inside of the file.
    """

    image: str
    label: str
    class_names: list[str] | None
    has_bytes: bool


def import_pyarrow(module: str = "pyarrow") -> Any:
    """Returns a module of pyarrow; ImportError that names the extra if there is none."""
    return require(module, extra="audit")


def find_columns(
    schema: Any,
    features: Any,
    image_column: str | None,
    label_column: str | None,
    name: str,
) -> Columns:
    """Returns the columns to read.

    Args:
        schema: of pyarrow.
        features: as Hugging Face's datasets describe columns, or anything else.
        image_column, label_column: names of columns, or None for the only image and the only
            class label among the features, or else for the usual names.
        name: what to call the table in a message.

    Raises:
        ValueError: if there is no such column, or it holds something else.
    """
    types = import_pyarrow("pyarrow.types")
    features = features if isinstance(features, dict) else {}

    def of_kind(kind: str) -> list[str]:
        found = (n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == kind)
        return [column for column in found if column in schema.names]

    images, labels = of_kind("Image"), of_kind("ClassLabel")
    if image_column is None and len(images) == 1:
        image_column = images[0]
    if label_column is None and len(labels) == 1:
        label_column = labels[0]
    image = columns.choose(schema.names, image_column, columns.IMAGE_COLUMNS, "image_column", name)
    label = columns.choose(schema.names, label_column, columns.LABEL_COLUMNS, "label_column", name)
    kind = schema.field(image).type
    is_struct = types.is_struct(kind) and "bytes" in {field.name for field in kind}
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind)
    if not (is_struct or is_bytes or types.is_string(kind) or types.is_large_string(kind)):
        raise ValueError(
            f"{name}: column {image!r} is {str(kind)[:100]}; expected encoded images (binary, or "
            "Hugging Face's Image) or paths"
        )
    names = features.get(label, {}).get("names") if isinstance(features.get(label), dict) else None
    if not (isinstance(names, list) and names and all(isinstance(text, str) for text in names)):
        names = None
    return Columns(image, label, names, is_struct or is_bytes)


def features_of(schema: Any) -> Any:
    """Returns the features that Hugging Face's datasets leave in the metadata of a schema."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def as_content(value: Any, root: Path, check: Callable[[Any], tuple[str, str]]) -> Content:
    """Returns the image that one cell stands for.

    Args:
        value: bytes, {"bytes", "path"}, or None.
        root, check: see `columns.safe_path`.
    """
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        if value is None and path is not None:
            name, reason = check(path)
            return Unreadable(reason) if reason else root / name
    if not isinstance(value, bytes):
        return Unreadable("The row holds no image.")
    return value


def problems_of(labels: columns.Labels) -> list[Problem]:
    """Returns a problem for each row without a class."""
    return [Problem(f"row {row}", reason) for row, reason in labels.reasons.items()]


def ids_of(rows: Sequence[int]) -> tuple[str, ...]:
    """Returns `row 3` for each row that is kept."""
    return tuple(f"row {row}" for row in rows)


def source_of(
    found: Columns,
    cells: Callable[[str], Sequence[Any]],
    images: Callable[[np.ndarray, Path, bool], Images],
    *,
    name: str,
    kinds: tuple[str, str],
    root: Path,
    follow_links: bool,
    max_pixels: int,
) -> Source:
    """Returns the images of a table, which are inside of it or at its paths.

    Args:
        found: the columns.
        cells: name of a column -> its values; not called for images inside.
        images: (rows with a class, root, follow_links) -> the images inside.
        name: what to call the table in a message.
        kinds: what to call the source: with images inside, and with paths.
        root, follow_links: see `columns.safe_path`.
        max_pixels: see `decode.decode`.

    Raises:
        ValueError: if no row has a class.
    """
    inside, of_paths = kinds
    if not found.has_bytes:
        return columns.source_of_paths(
            cells(found.image),
            cells(found.label),
            names=found.class_names,
            reasons={},
            name=name,
            kind=of_paths,
            root=root,
            follow_links=follow_links,
            max_pixels=max_pixels,
        )
    labels = columns.classes(cells(found.label), found.class_names, f"{name}: {found.label}")
    return Source(
        images(labels.rows, root, follow_links),
        ids=ids_of(labels.rows.tolist()),
        labels=labels.labels,
        class_names=labels.class_names,
        kind=inside,
        problems=problems_of(labels),
        max_pixels=max_pixels,
    )
