"""Any data set of tensorflow-datasets (TFDS) with images and class labels, from its folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxpoison.core.checks import listing
from jaxpoison.data.readers import arrow, columns, tfds
from jaxpoison.data.readers.contents import Content, Unreadable
from jaxpoison.data.readers.source import Source, file_state

_ROWS_AT_ONCE = 64


class RecordImages:
    """Images in records of TFDS, as they are encoded; see `source.Images`."""

    def __init__(self, folder: Path, records: Any, column: str, rows: list[int]):
        """Takes a data source of TFDS, the name of the image, and which records are images."""
        self._folder, self._records = folder, records
        self._column, self._rows = column, rows

    def contents(self) -> Iterator[Content]:
        """Yields the images, in blocks, since one read for each takes twice as long."""
        for rows in _blocks(self._rows):
            try:
                examples = self._records.__getitems__(rows)
            except Exception:  # a damaged record; one by one, the others can be read
                yield from map(self._read, rows)
            else:
                for example in examples:
                    yield _content(example[self._column])

    def content(self, row: int) -> Content:
        """Returns one image."""
        return self._read(self._rows[row])

    def _read(self, row: int) -> Content:
        try:
            return _content(self._records[row][self._column])
        except Exception as error:  # array_record raises many types for damaged files
            return Unreadable(f"The record is damaged ({type(error).__name__}).")

    def path(self, row: int) -> Path | None:
        """Returns None: no file holds this image alone."""
        return None

    def fingerprint(self) -> Iterator[bytes]:
        """Yields size and time of change of the files in the folder."""
        for file in sorted(self._folder.iterdir()):
            yield file.name.encode("utf-8", "surrogateescape") + file_state(file)


def find(folder: Path) -> Path | None:
    """Returns `folder`, or its newest version, if TFDS has written it in array_record format."""
    if (folder / "dataset_info.json").is_file() and (folder / "features.json").is_file():
        return folder
    return tfds.newest_version(folder)


def open_records(
    folder: Path,
    split: str | None,
    *,
    image_column: str | None,
    label_column: str | None,
    max_pixels: int,
) -> Source:
    """Returns the images of one part of a data set.

    Args:
        folder: as `find` returns it.
        split: the part, such as "train"; needed if there are several.
        image_column, label_column: names of features; by default the only Image and the only
            ClassLabel.
        max_pixels: see `decode.decode`.

    Raises:
        ImportError: if TFDS is missing; the message names the extra.
        ValueError: if the folder is damaged, is in TFRecord format, names code outside of TFDS,
            has no such features, or `split` is missing or not there.
    """
    if not tfds.is_array_record(folder / "dataset_info.json"):
        raise ValueError(
            f"{folder} is in a format that needs TensorFlow; prepare it again with "
            'file_format="array_record"'
        )
    module = tfds.import_tfds(f" (reading {folder})")
    tfds.check_features(folder)
    try:
        builder = module.builder_from_directory(folder)
        parts, features = list(builder.info.splits), dict(builder.info.features)
    except Exception as error:  # protobuf, json and TFDS raise many kinds for damaged files
        raise tfds.damaged(str(folder), error) from error
    if split is None and len(parts) > 1:
        raise ValueError(
            f"{folder} holds several parts of a data set, {listing(parts)}: choose one with split, "
            f"such as split={parts[0]!r}"
        )
    part = parts[0] if split is None and parts else split
    if part not in parts:
        raise ValueError(
            f"split is {split!r}, but {folder} has no such part (it has: {listing(parts)})"
        )
    image = _feature(features, module.features.Image, image_column, "image_column", folder)
    label = _feature(features, module.features.ClassLabel, label_column, "label_column", folder)
    try:
        decoders = {image: module.decode.SkipDecoding()}
        records = builder.as_data_source(split=part, decoders=decoders)
        if len(records) > sum(file.stat().st_size for file in folder.iterdir()):
            raise ValueError(f"it claims {len(records):,} images, more than it has bytes")
        values = [
            example[label]
            for rows in _blocks(range(len(records)))
            for example in records.__getitems__(rows)
        ]
    except Exception as error:  # array_record raises many types for damaged files
        raise tfds.damaged(str(folder), error) from error
    labels = columns.classes(values, features[label].names, f"{folder}: {label}")
    rows = labels.rows.tolist()
    return Source(
        RecordImages(folder, records, image, rows),
        ids=arrow.ids_of(rows),
        labels=labels.labels,
        class_names=labels.class_names,
        kind=f"{part} of a folder of tensorflow-datasets",
        problems=arrow.problems_of(labels),
        max_pixels=max_pixels,
    )


def _blocks(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    return (rows[at : at + _ROWS_AT_ONCE] for at in range(0, len(rows), _ROWS_AT_ONCE))


def _content(value: Any) -> Content:
    return value if isinstance(value, bytes) else Unreadable("The record holds no image.")


def _feature(
    features: dict[str, Any], kind: Any, wanted: str | None, argument: str, folder: Path
) -> str:
    """Returns the name of the only feature of a kind, or checks the one that is wanted."""
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if wanted in found:
        return wanted
    if wanted is None and len(found) == 1:
        return found[0]
    raise ValueError(
        f"{folder} has {listing(found) or 'no features'} of kind {kind.__name__} (all: "
        f"{listing(features)}): name one with {argument}"
    )
