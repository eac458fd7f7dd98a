"""Images and labels in an .npz file under any of the usual names."""

from pathlib import Path

from jaxpoison.core.checks import listing
from jaxpoison.core.files import npz_names, read_npz
from jaxpoison.data.readers import arrays
from jaxpoison.data.readers.folders import PARTS
from jaxpoison.data.readers.source import Source, check_lengths, file_state, row_ids

_IMAGES = ("images", "image", "x", "data", "imgs", "pixels", "arr_0")
_LABELS = ("labels", "label", "y", "targets", "target", "classes", "arr_1")
_CLASS_NAMES = ("class_names", "label_names", "names")
_WHAT = "an .npz file of images and labels"


def open_npz(path: Path, split: str | None, *, max_pixels: int) -> Source:
    """Returns the images in an .npz file; arrays stored without compression are memory-mapped.

    Names are looked for without regard to case: images and labels, x and y, data and targets,
    arr_0 and arr_1; with parts x_train or train_images and so on. `class_names` may hold names.

    Args:
        path: the file.
        split: the part to read, where the names have train, val or test in them.
        max_pixels: see `decode.decode`.

    Raises:
        ValueError: if the file is damaged, holds objects, or no such names; if `split` is missing
            or not there; and as `Source.from_arrays`.
    """
    names = {name.lower(): name for name in npz_names(path, _WHAT)}
    image_entry, label_entry = _entries(path, names, split)
    class_entry = next((names[name] for name in _CLASS_NAMES if name in names), None)
    wanted = (image_entry, label_entry, *([class_entry] if class_entry else []))
    entries = read_npz(path, _WHAT, required=wanted, optional=(), mapped=True)
    images = arrays.as_images(entries[image_entry], f"{path}: {image_entry}")
    labels, class_names = arrays.as_labels(
        entries[label_entry],
        None if class_entry is None else entries[class_entry].tolist(),
        f"{path}: {label_entry}",
    )
    try:
        check_lengths(len(images), len(labels), "labels")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Source(
        arrays.ArrayImages(images, file_state(path) + image_entry.encode()),
        ids=row_ids(len(images)),
        labels=labels,
        class_names=class_names,
        kind=f"{image_entry} and {label_entry} in an .npz file",
        max_pixels=max_pixels,
    )


def _entries(path: Path, names: dict[str, str], split: str | None) -> tuple[str, str]:
    """Returns the names of images and labels of one part.

    Args:
        path: for messages.
        names: {lower case: as it is} for all arrays in the file.
        split: the part, or None.
    """
    pairs = {}
    for part, words in {"": ("",), **PARTS}.items():
        forms = ["{}_" + word if word else "{}" for word in words]
        forms += [word + "_{}" for word in words if word]
        images = _first(names, _IMAGES, forms)
        labels = _first(names, _LABELS, forms)
        if images and labels:
            pairs[part] = (images, labels)
    found = listing(names.values()) or "nothing"
    if split is not None:
        part = next((part for part, words in PARTS.items() if split.lower() in words), split)
        if part and part in pairs:
            return pairs[part]
        raise ValueError(f"split is {split!r}, but {path} has no such arrays (it has: {found})")
    if "" in pairs:
        return pairs[""]
    if len(pairs) > 1:
        raise ValueError(
            f"{path} holds several parts of a data set, {listing(pairs)}: choose one with split, "
            f"such as split={next(iter(pairs))!r}"
        )
    if pairs:
        return next(iter(pairs.values()))
    raise ValueError(
        f"{path} lacks images and labels; expected arrays named images and labels, x and y, or "
        f"x_train and y_train (it has: {found})"
    )


def _first(names: dict[str, str], stems: tuple[str, ...], forms: list[str]) -> str | None:
    wanted = (form.format(stem) for form in forms for stem in stems)
    return next((names[name] for name in wanted if name in names), None)
