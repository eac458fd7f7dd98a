"""What an image is before it is decoded: a file, bytes or an array; and names that can be printed.

Nothing here needs Pillow, so that importing the package does not import it.
"""

import os
from pathlib import Path

import numpy as np

EXTENSIONS = frozenset(
    (
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp"),
        *(".bmp", ".dib", ".gif", ".tif", ".tiff"),
    )
)
OTHER_EXTENSIONS = frozenset(
    (
        *(".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".ico", ".psd", ".tga"),
        *(".dng", ".cr2", ".nef", ".arw", ".raw", ".exr", ".hdr", ".dcm"),
        *(".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
"""Images of formats that are not read: problems, since leaving them out unsaid would be a lie."""
MAX_PIXELS = 100_000_000


class Unreadable(ValueError):
    """An image that cannot be read; its text is the reason, one sentence for people."""


Content = Path | bytes | np.ndarray | Unreadable
"""One image as its source has it: a file, the bytes of one, an array, or why there is none."""


def display_name(name: str | os.PathLike[str]) -> str:
    r"""Returns a name that can be printed: on one line, without control characters, in UTF-8.

    Bytes that are not UTF-8 become `\xff`, unprintable characters such as line breaks `\x0a` or
    `\u202e`, and a backslash two. Different names stay different.
    """
    text = os.fspath(name)
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if character == "\\":
        return r"\\"
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if character.isprintable():
        return character
    # Characters of Latin-1 take four digits too, since two are for bytes.
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
