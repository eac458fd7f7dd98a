"""From the bytes of one image, or an array, to RGB pixels of a given size; with hostile files.

Formats are known by their first bytes, never by the name of the file. The header is looked at
before anything is decoded, so that a small file cannot ask for gigabytes. Files are opened for
reading only. This module imports Pillow, and is imported when the first image is decoded.
"""

import contextlib
import hashlib
import math
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from jaxpoison.data.readers.contents import Content, Unreadable

_FORMATS: tuple[tuple[bytes, Callable[..., ImageFile.ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
    (b"II+\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0+", TiffImagePlugin.TiffImageFile),
)
# JPEG files of at least twice this many pixels on both sides are decoded at a half, a quarter or
# an eighth of their size, but never to less than this.
_ENOUGH = 512
# From here on images are decoded one at a time, whatever the number of threads.
_LARGE = 8_000_000
_one_large = threading.Lock()
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAP_SIDES = frozenset(_TURNS[number] for number in (5, 6, 7, 8))


class Decoded(NamedTuple):
    """One image.

    Attributes:
        pixels: uint8 [S, S, 3], or as large as asked.
        digest: 32 bytes, SHA-256 of `size` and the decoded RGB pixels; equal for copies in any
            format without loss. Of a JPEG file with 1024 pixels or more on both sides it is that
            of the pixels decoded at reduced size, so only JPEG copies of it are equal.
        size: height and width as decoded, after the rotation that EXIF asks for.
    """

    pixels: np.ndarray
    digest: bytes
    size: tuple[int, int]


def decode(content: Content, size: int, max_pixels: int) -> Decoded:
    """Returns one image, resized to `size` x `size` (bilinear with antialias; aspect not kept).

    Raises:
        Unreadable: for anything else than an image of at most `max_pixels` pixels.
    """
    with _image(content, max_pixels, max(size, _ENOUGH)) as (image, (height, width)):
        digest = hashlib.sha256(struct.pack("<II", height, width))
        if (image.height, image.width) != (height, width):
            digest.update(struct.pack("<II", image.height, image.width))
        # In bands: the bytes of a large image would double what it takes.
        band = max(1, 1_000_000 // image.width)
        if band >= image.height:
            digest.update(image.tobytes())
        else:
            for top in range(0, image.height, band):
                box = (0, top, image.width, min(top + band, image.height))
                digest.update(image.crop(box).tobytes())
        resized = _resized(image, (size, size))
        return Decoded(np.asarray(resized), digest.digest(), (height, width))


def decode_or_say(content: Content, size: int, max_pixels: int) -> Decoded | str:
    """Returns one image as `decode`, or the reason why it cannot be read."""
    try:
        return decode(content, size, max_pixels)
    except Unreadable as error:
        return str(error)


def decode_whole(content: Content, most: int | None, max_pixels: int) -> np.ndarray:
    """Returns one image, uint8 [H, W, 3], with its aspect.

    Args:
        content: what to decode.
        most: the longer side is made this long if it is longer; None leaves it as it is.
        max_pixels: see `decode`.

    Raises:
        Unreadable: see `decode`.
    """
    with _image(content, max_pixels, most) as (image, (height, width)):
        if most is not None and max(height, width) > most:
            scale = most / max(height, width)
            image = _resized(image, (max(1, round(width * scale)), max(1, round(height * scale))))
        return np.array(image)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)


@contextlib.contextmanager
def _image(
    content: Content, max_pixels: int, enough: int | None
) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Gives (RGB image, (height, width) at full size); every error becomes an Unreadable."""
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(content, Unreadable):
                raise content
            if isinstance(content, np.ndarray):
                image = Image.fromarray(array_to_rgb(content))
                yield image, (image.height, image.width)
                return
            stream = stack.enter_context(_stream(content))
            opened = _open(stream)
            width, height = opened.size
            if width * height > max_pixels:
                raise Unreadable(
                    f"The image has {width:,} x {height:,} pixels, more than max_pixels, "
                    f"{max_pixels:,}."
                )
            if width * height > _LARGE:
                stack.enter_context(_one_large)
            yield _load(opened, enough)
    except Unreadable:
        raise
    except MemoryError as error:
        raise Unreadable("The image does not fit in memory.") from error
    except Exception as error:  # damaged files make Pillow raise errors of every kind
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise Unreadable(f"The image is damaged ({reason}).") from error


def _stream(content: Path | bytes) -> BinaryIO:
    if isinstance(content, bytes):
        if not content:
            raise Unreadable("The image is empty, 0 bytes.")
        return BytesIO(content)
    try:
        # Before it is opened: opening a pipe would wait for a writer.
        status = content.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("This is no regular file.")
        if not status.st_size:
            raise Unreadable("The file is empty, 0 bytes.")
        return content.open("rb")
    except PermissionError as error:
        raise Unreadable("There is no permission to read the file.") from error
    except FileNotFoundError as error:
        raise Unreadable("The file does not exist.") from error
    except OSError as error:
        raise Unreadable(f"The file cannot be opened ({error.strerror}).") from error


def _open(stream: BinaryIO) -> ImageFile.ImageFile:
    """Returns an image of which only the header has been read."""
    # By its class and not by Image.open: that has a limit of pixels of its own, which is global,
    # and tries 40 more formats on hostile bytes.
    start = stream.read(12)
    stream.seek(0)
    for magic, factory in _FORMATS:
        if start.startswith(magic) and (magic != b"RIFF" or start[8:] == b"WEBP"):
            return factory(stream)
    raise Unreadable("The content is not PNG, JPEG, WebP, BMP, GIF or TIFF.")


def _load(image: ImageFile.ImageFile, enough: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """Returns the RGB image, upright, and (height, width) at full size."""
    width, height = image.size
    is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
    if enough is not None and is_jpeg:
        image.draft(None, (enough, enough))
    image.load()  # TIFF images turn themselves
    turn = None
    with contextlib.suppress(Exception):  # damaged EXIF data do not make an image unreadable
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    rgb = _to_rgb(image)
    rgb = rgb if turn is None else rgb.transpose(turn)
    if not is_jpeg:
        return rgb, (rgb.height, rgb.width)
    return rgb, ((width, height) if turn in _SWAP_SIDES else (height, width))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Returns any mode as RGB: transparent pixels over white, 16 bits scaled to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return Image.fromarray(_from_sixteen_bits(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_from_floats(np.asarray(image))).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        return white.convert("RGB")
    if image.mode == "LAB":
        raise Unreadable("Its colors are CIE Lab, which is not read; save it as RGB.")
    return image.convert("RGB")


def _from_sixteen_bits(values: np.ndarray) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise Unreadable(f"Its pixels lie in {low}..{high}; expected 8 or 16 bits.")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_floats(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise Unreadable("Some of its pixels are NaN or infinite.")
    if low < 0 or high > 1:
        raise Unreadable(f"Its pixels lie in [{low:g}, {high:g}]; floats are read in [0, 1].")
    return np.rint(values * 255).astype(np.uint8)


def array_to_rgb(image: np.ndarray) -> np.ndarray:
    """Returns one image [H, W, C] with C of 1, 3 or 4 as uint8 [H, W, 3], contiguous.

    Args:
        image: uint8, or floating point in [0, 1]; the fourth channel is opacity, over white.

    Raises:
        Unreadable: for floats that are not finite or outside [0, 1].
    """
    if image.dtype != np.uint8:
        image = _from_floats(image)
    if image.shape[2] == 1:
        image = np.broadcast_to(image, (*image.shape[:2], 3))
    if image.shape[2] == 4:
        image = np.asarray(_to_rgb(Image.fromarray(np.ascontiguousarray(image), "RGBA")))
    return np.ascontiguousarray(image)
