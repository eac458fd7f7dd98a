"""What a path holds, and which reader it is for."""

import os
from pathlib import Path

from jaxpoison.core.checks import check_count
from jaxpoison.data.readers import folders, packed
from jaxpoison.data.readers.contents import EXTENSIONS, MAX_PIXELS
from jaxpoison.data.readers.source import Source

_READ = "a folder with a folder of images for each class, or an .npz file"


def open_source(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    follow_links: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """Returns the labeled images in a file or folder. Nothing is written, and nothing unpickled.

    Files that cannot be read are `Source.problems`, not errors.

    Args:
        path: one of
            - a folder with a folder for each class: PNG, JPEG, WebP, BMP, GIF (first frame) and
              TIFF, known by their extension;
            - a folder with such folders named train, val or test;
            - a folder of images without classes, which is one class;
            - an .npz file of images and labels (x and y, x_train and y_train, ...).
            `~` stands for the home folder.
        split: the part to read, such as "train"; needed only where there are several.
        follow_links: whether symbolic links are followed; otherwise they are problems.
        max_pixels: images with more pixels are not decoded, and are problems.

    Raises:
        FileNotFoundError: if there is nothing.
        PermissionError: if it may not be read.
        ValueError: for what is none of these, is damaged as a whole, has no readable image,
            or where `split` is needed; the message says what was found.
    """
    check_count(max_pixels=max_pixels)
    place = Path(path).expanduser()
    _kind(place)
    if place.is_dir():
        return folders.open_folder(place, split, follow_links=follow_links, max_pixels=max_pixels)
    return packed.open_npz(place, split, max_pixels=max_pixels)


def _kind(place: Path) -> str:
    """Returns the name of the reader, or raises for what none can read."""
    if place.is_dir():
        return "images"
    if not place.exists():
        what = "is a link that leads nowhere" if place.is_symlink() else "does not exist"
        raise FileNotFoundError(f"{place} {what}; expected {_READ}")
    extension = place.suffix.lower()
    if extension == ".npz":
        return "npz"
    advice = f"expected {_READ}"
    if extension in EXTENSIONS:
        advice = f"this is one image: give its folder, {place.parent}"
    elif extension in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".xz", ".bz2", ".zst"):
        advice = f"unpack it first; then {advice}"
    raise ValueError(f"{place} is not of a kind that is read: {advice}")
