"""Sources: images of every format, folders and tables, and files that mean no good."""

import contextlib
import hashlib
import io
import json
import os
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import run_code

from jaxpoison import data
from jaxpoison.data import prepare
from jaxpoison.data.readers import Unreadable, contents, decode, open_source
from jaxpoison.data.readers.source import Source


def noise(height=8, width=8, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def class_folders(root, classes=("cat", "dog"), each=3, size=8):
    for number, name in enumerate(classes):
        for image in range(each):
            save(root / name / f"{image}.png", noise(size, size, seed=100 * number + image))
    return root


def everything(source, size=8, batch_size=4):
    """Returns one pass as one batch."""
    batches = list(source.batches(size, batch_size))
    assert all(len(batch.rows) == batch_size for batch in batches[:-1])
    return type(batches[0])(*map(np.concatenate, zip(*batches, strict=True)))


def reasons(source):
    return dict(source.problems)


def snapshot(root):
    """Returns all that can be seen of a folder: names, sizes, times and bytes."""
    return sorted(
        (
            os.fsencode(path),
            os.lstat(path).st_mtime_ns,
            Path(path).read_bytes() if os.path.isfile(path) else None,
        )
        for folder, folders, files in os.walk(root)
        for path in (os.path.join(folder, name) for name in (*folders, *files))
    )


def png(width, height, compressed=b""):
    """Returns a PNG file that claims a size, with these bytes for its pixels."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", compressed or zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


# ---- one image ----


def test_formats_without_loss_give_the_same_pixels_and_digest(tmp_path):
    image = noise()
    digests = set()
    for name in ("a.png", "a.bmp", "a.tiff", "a.webp", "upper.PNG"):
        path = save(tmp_path / name, image, **({"lossless": True} if "webp" in name else {}))
        got = decode.decode(path, 8, 10**6)
        np.testing.assert_array_equal(got.pixels, image)
        assert got.size == (8, 8)
        digests.add(got.digest)
    want = hashlib.sha256(struct.pack("<II", 8, 8) + image.tobytes()).digest()
    assert digests == {want}


def test_the_format_is_known_by_content(tmp_path):
    path = save(tmp_path / "a.png", noise())
    path.rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(decode.decode(tmp_path / "a.jpg", 8, 10**6).pixels, noise())


def test_gray_is_three_equal_channels_and_a_copy_of_its_rgb_form(tmp_path):
    gray = noise(channels=0)
    one = decode.decode(save(tmp_path / "gray.png", gray), 8, 10**6)
    rgb = np.repeat(gray[..., None], 3, axis=2)
    two = decode.decode(save(tmp_path / "rgb.png", rgb), 8, 10**6)
    np.testing.assert_array_equal(one.pixels, rgb)
    assert one.digest == two.digest


def test_transparency_is_put_over_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[0, :, 3] = 255  # black and opaque
    rgba[1, :, 3] = 51  # black, a fifth
    want = np.full((4, 4, 3), 255, np.uint8)
    want[0], want[1] = 0, 204
    for name in ("a.png", "a.webp", "a.tiff"):
        path = save(tmp_path / name, rgba, **({"lossless": True} if "webp" in name else {}))
        np.testing.assert_array_equal(decode.decode(path, 4, 100).pixels, want)
    gray = Image.fromarray(rgba[..., [0, 3]], "LA")
    gray.save(tmp_path / "la.png")
    np.testing.assert_array_equal(decode.decode(tmp_path / "la.png", 4, 100).pixels, want)
    np.testing.assert_array_equal(decode.decode(rgba, 4, 100).pixels, want)


@pytest.mark.parametrize("mode", ["bytes", "index"])
def test_palettes_with_transparency(tmp_path, mode):
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) % 3, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    path = tmp_path / "a.png"
    image.save(path, transparency=b"\xff\x00\xff" if mode == "bytes" else 1)
    pixels = decode.decode(path, 4, 100).pixels
    np.testing.assert_array_equal(pixels[0, 0], [255, 0, 0])
    np.testing.assert_array_equal(pixels[0, 1], [255, 255, 255])
    np.testing.assert_array_equal(pixels[0, 2], [0, 0, 255])


def test_one_bit_and_palette_images(tmp_path):
    bits = Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert("1")
    bits.save(tmp_path / "bits.png")
    got = decode.decode(tmp_path / "bits.png", 8, 100).pixels
    np.testing.assert_array_equal(got[..., 0], np.eye(8, dtype=np.uint8) * 255)
    palette = Image.fromarray(noise(2, 2)).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "a.gif")
    got = decode.decode(tmp_path / "a.gif", 2, 100).pixels
    np.testing.assert_array_equal(got, np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path, name):
    values = np.array([[0, 128, 129, 257], [32768, 65535, 65406, 1000]], np.uint16)
    pixels = decode.decode(save(tmp_path / name, values), 4, 100).pixels
    got = decode.decode_whole(tmp_path / name, None, 100)[..., 0]
    np.testing.assert_array_equal(got, np.rint(values / 257).astype(np.uint8))
    assert pixels.shape == (4, 4, 3)


def test_float_tiffs_are_read_in_the_unit_interval_only(tmp_path):
    path = save(tmp_path / "a.tiff", np.array([[0, 0.5, 1]], np.float32))
    np.testing.assert_array_equal(decode.decode_whole(path, None, 9)[0, :, 0], [0, 128, 255])
    for values, reason in (([[0, 2]], "lie in"), ([[0, np.nan]], "NaN")):
        path = save(tmp_path / "b.tiff", np.array(values, np.float32))
        with pytest.raises(Unreadable, match=reason):
            decode.decode(path, 4, 100)


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    pixels = decode.decode(tmp_path / "a.jpg", 8, 100).pixels
    assert pixels[..., 0].min() > 200 and pixels[..., 1:].max() < 60


def test_the_first_frame_of_animations(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png", "a.tiff"):
        options = {"lossless": True} if "webp" in name else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        pixels = decode.decode(tmp_path / name, 4, 100).pixels
        np.testing.assert_array_equal(pixels[0, 0], [255, 0, 0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.webp", "a.jpg"])
def test_exif_rotation(tmp_path, name, orientation):
    """The image as it is meant: stored with the inverse of what the tag asks for."""
    meant = np.zeros((16, 32, 3), np.uint8)
    meant[:8, :16] = 255  # white at the top left
    stored = {
        1: meant, 2: meant[:, ::-1], 3: meant[::-1, ::-1], 4: meant[::-1],
        5: meant.transpose(1, 0, 2), 6: np.rot90(meant), 7: np.rot90(meant, 2).transpose(1, 0, 2),
        8: np.rot90(meant, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if "webp" in name else {}
    path = save(tmp_path / name, np.ascontiguousarray(stored), exif=exif, **options)
    whole = decode.decode_whole(path, None, 10**4)
    np.testing.assert_allclose(whole, meant, atol=3)
    got = decode.decode(path, 16, 10**4)
    assert got.size == (16, 32) and got.pixels.shape == (16, 16, 3)
    assert got.pixels[0, 0].min() > 250 and got.pixels[0, -1].max() < 5


def test_large_photos_are_decoded_at_reduced_size(tmp_path):
    ramp = np.linspace(0, 255, 2400).astype(np.uint8)
    image = np.broadcast_to(ramp[None, :, None], (1200, 2400, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", np.ascontiguousarray(image), exif=exif, quality=95)
    got = decode.decode(path, 24, 10**7)
    assert got.size == (2400, 1200)
    want = np.linspace(0, 255, 24 * 2 + 1)[1::2]  # the middle of each of 24 steps
    np.testing.assert_allclose(got.pixels[:, 5, 1], want, atol=4)
    # Sizes up to 512 decode the same pixels.
    assert got.digest == decode.decode(path, 224, 10**7).digest
    assert decode.decode_whole(path, 100, 10**7).shape == (100, 50, 3)


def test_resizing_is_antialiased_and_keeps_images_of_the_right_size(tmp_path):
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    path = save(tmp_path / "a.png", checks)
    assert np.ptp(decode.decode(path, 8, 10**4).pixels.astype(int) - 128) <= 2
    np.testing.assert_array_equal(decode.decode(path, 64, 10**4).pixels[..., 0], checks)


def test_whole_images_keep_their_aspect(tmp_path):
    path = save(tmp_path / "a.png", noise(10, 30))
    np.testing.assert_array_equal(decode.decode_whole(path, None, 300), noise(10, 30))
    np.testing.assert_array_equal(decode.decode_whole(path, 30, 300), noise(10, 30))
    assert decode.decode_whole(path, 15, 300).shape == (5, 15, 3)
    assert decode.decode_whole(save(tmp_path / "b.png", noise(1, 300)), 10, 300).shape == (1, 10, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty, 0 bytes"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"<html>", "not PNG, JPEG"),
        (b"RIFF1234WAVE", "not PNG, JPEG"),
        (b"GIF89a", "damaged"),
        (b"BM", "damaged"),
        (b"II*\0\xff\xff\xff\xff", "damaged"),
        (b"\xff\xd8\xff", "damaged"),
        (b"%!PS-Adobe-3.0 EPSF", "not PNG, JPEG"),
        (png(50_000, 50_000), "50,000 x 50,000 pixels, more than max_pixels"),
        (png(2**31 - 1, 2**31 - 1), "more than max_pixels"),
        (png(0, 5), "damaged"),
        (png(100, 100), "damaged"),
        (png(100, 100, b"no zlib"), "damaged"),
        (b"BM" + struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24) + bytes(24),
         "more than max_pixels"),
        (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
         + b",\0\0\0\0\xff\xff\xff\xff\0\2", "more than max_pixels"),
    ],
)  # fmt: skip
def test_hostile_bytes_are_unreadable(tmp_path, content, reason):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for given in (path, content):
        with pytest.raises(Unreadable, match=reason) as caught:
            decode.decode(given, 8, contents.MAX_PIXELS)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif", "a.tiff"])
def test_truncated_files_are_unreadable(tmp_path, name):
    path = save(tmp_path / name, noise(64, 64))
    content = path.read_bytes()
    for share in (0.05, 0.5, 0.9):
        with pytest.raises(Unreadable):
            decode.decode(content[: int(len(content) * share)], 8, 10**6)


def test_random_damage_never_raises_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp", "a.gif", "a.tiff"):
        content = save(tmp_path / name, noise(16, 16)).read_bytes()
        for _ in range(60):
            damaged = np.frombuffer(content, np.uint8).copy()
            places = rng.integers(0, len(damaged), 3)
            damaged[places] = rng.integers(0, 256, 3)
            with contextlib.suppress(Unreadable):
                decode.decode(damaged.tobytes(), 8, 10**6)


def test_the_bound_on_pixels_is_inclusive(tmp_path):
    path = save(tmp_path / "a.png", noise(10, 10))
    decode.decode(path, 8, 100)
    with pytest.raises(Unreadable, match="10 x 10 pixels"):
        decode.decode(path, 8, 99)


def test_names_that_can_be_printed():
    assert contents.display_name("a/ä 猫.png") == "a/ä 猫.png"
    assert contents.display_name("a\nb") == r"a\u000ab"
    assert contents.display_name(os.fsdecode(b"\xff.png")) == r"\xff.png"
    assert contents.display_name("a\\nb") == r"a\\nb"
    assert contents.display_name("\u202egnp.exe") == r"\u202egnp.exe"
    assert contents.display_name("\U000e0001") == r"\U000e0001"


# ---- folders ----


def test_class_folders(tmp_path):
    source = open_source(class_folders(tmp_path))
    assert source.ids == tuple(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3))
    np.testing.assert_array_equal(source.labels, np.array([0, 0, 0, 1, 1, 1], np.int32))
    assert source.labels.dtype == np.int32
    assert source.class_names == ("cat", "dog") and len(source) == 6
    assert not source.problems and source.readable.all() and not source.sizes.any()
    got = everything(source)
    want = np.stack([noise(seed=100 * c + i) for c in range(2) for i in range(3)])
    np.testing.assert_array_equal(got.images, want)
    np.testing.assert_array_equal(got.rows, np.arange(6))
    assert got.digests.shape == (6, 32) and got.digests.dtype == np.uint8
    assert got.sizes.dtype == np.int32 and (source.sizes == 8).all()
    assert source.path(4) == tmp_path / "dog" / "1.png"
    np.testing.assert_array_equal(source.image(4), want[4])
    assert source.image(4, most=4).shape == (4, 4, 3)
    with pytest.raises(IndexError, match="rows 0 to 5"):
        source.image(6)


def test_a_pass_can_be_repeated_and_left(tmp_path):
    source = open_source(class_folders(tmp_path, each=100))
    next(source.batches(8, 2))
    np.testing.assert_array_equal(everything(source, 8, 7).rows, np.arange(200))
    np.testing.assert_array_equal(everything(source, 4, 512).rows, np.arange(200))


@pytest.mark.parametrize("arguments", [(0, 1), (8, 0), (-1, 4)])
def test_batches_refuses_what_is_no_size(tmp_path, arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        open_source(class_folders(tmp_path)).batches(*arguments)


def test_deeper_folders_belong_to_the_class_and_hidden_files_to_nobody(tmp_path):
    class_folders(tmp_path)
    save(tmp_path / "cat" / "deep" / "er" / "x.png", noise())
    save(tmp_path / "cat" / ".hidden.png", noise())
    save(tmp_path / ".cache" / "x.png", noise())
    save(tmp_path / "__MACOSX" / "cat" / "._0.png", noise())
    (tmp_path / "cat" / "notes.txt").write_text("hello")
    (tmp_path / "README").write_text("hello")
    source = open_source(tmp_path)
    assert "cat/deep/er/x.png" in source.ids and len(source) == 7
    assert source.class_names == ("cat", "dog")
    assert reasons(source) == {"__MACOSX/": "The folder holds no images."}


def test_a_flat_folder_is_one_class(tmp_path):
    for image in range(3):
        save(tmp_path / "pets" / f"{image}.png", noise(seed=image))
    source = open_source(tmp_path / "pets")
    assert source.class_names == ("pets",) and source.ids == ("0.png", "1.png", "2.png")
    assert len(everything(source).rows) == 3


def test_a_flat_folder_with_a_table_names_the_table(tmp_path):
    save(tmp_path / "0.png", noise())
    (tmp_path / "labels.csv").write_text("path,label\n0.png,cat\n")
    with pytest.raises(ValueError, match=r"open the table instead, .*labels\.csv"):
        open_source(tmp_path)


def test_images_outside_of_the_classes_are_problems(tmp_path):
    save(class_folders(tmp_path) / "stray.png", noise())
    source = open_source(tmp_path)
    assert len(source) == 6
    assert reasons(source) == {"stray.png": "The image lies outside of the class folders."}


def test_parts_are_asked_for(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "Test", classes=("cat", "eel"))
    with pytest.raises(ValueError, match=r"several parts .* split='train'"):
        open_source(tmp_path)
    train = open_source(tmp_path, split="train")
    assert train.class_names == ("cat", "dog") and train.ids[0] == "train/cat/0.png"
    assert open_source(tmp_path, split="test").class_names == ("cat", "eel")
    with pytest.raises(ValueError, match="no such folder"):
        open_source(tmp_path, split="validation")
    with pytest.raises(ValueError, match="no such folder"):
        open_source(tmp_path, split="../elsewhere")


def test_the_only_part_is_taken_and_a_class_may_be_called_test(tmp_path):
    class_folders(tmp_path / "one" / "training")
    assert open_source(tmp_path / "one").class_names == ("cat", "dog")
    class_folders(tmp_path / "two", classes=("test", "quiz"))
    assert open_source(tmp_path / "two").class_names == ("quiz", "test")


def test_mixed_sizes_and_duplicates(tmp_path):
    for number, shape in enumerate([(1, 1), (3, 200), (200, 3), (8, 8)]):
        save(tmp_path / "a" / f"{number}.png", noise(*shape))
        save(tmp_path / "b" / f"{number}.bmp", noise(*shape))
    got = everything(open_source(tmp_path))
    assert got.images.shape == (8, 8, 8, 3)
    np.testing.assert_array_equal(got.sizes[:3], [(1, 1), (3, 200), (200, 3)])
    np.testing.assert_array_equal(got.digests[:4], got.digests[4:])
    assert len({digest.tobytes() for digest in got.digests}) == 4


def test_unreadable_files_are_problems_and_the_others_come(tmp_path):
    class_folders(tmp_path)
    before = {
        "cat/empty.png": b"",
        "cat/text.jpg": b"hello",
        "dog/cut.png": (tmp_path / "dog" / "0.png").read_bytes()[:-40],
        "dog/huge.png": png(100_000, 100_000),
        "dog/photo.heic": b"ftypheic",
    }
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dog" / "folder.png").mkdir()
    source = open_source(tmp_path)
    assert len(source) == 10
    got = everything(source, batch_size=5)
    assert len(got.rows) == 6 and (~source.readable).sum() == 4
    assert not source.sizes[~source.readable].any()
    assert reasons(source).keys() == before.keys()
    assert reasons(source)["dog/photo.heic"] == "HEIC is not read; save it as PNG."
    assert [source.ids[row] for row in got.rows] == [
        f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)
    ]
    everything(source)
    assert len(source.problems) == 5  # said once
    with pytest.raises(Unreadable, match="empty"):
        source.image(source.ids.index("cat/empty.png"))


def test_a_folder_where_nothing_is_readable_is_a_pass_without_batches(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"")
    source = open_source(tmp_path)
    assert list(source.batches(8, 4)) == [] and len(source.problems) == 1


def test_a_file_that_vanishes_or_changes_is_a_problem(tmp_path):
    source = open_source(class_folders(tmp_path))
    first = source.fingerprint()
    (tmp_path / "cat" / "0.png").unlink()
    assert len(everything(source).rows) == 5
    assert reasons(source) == {"cat/0.png": "The file does not exist."}
    assert source.fingerprint() != first


def test_fingerprints(tmp_path):
    first = open_source(class_folders(tmp_path / "one"))
    key = first.fingerprint()
    everything(first)
    assert first.fingerprint() == key == open_source(tmp_path / "one").fingerprint()
    os.rename(tmp_path / "one", tmp_path / "moved")
    assert open_source(tmp_path / "moved").fingerprint() == key
    os.utime(tmp_path / "moved" / "cat" / "0.png", ns=(1, 1))
    changed = open_source(tmp_path / "moved").fingerprint()
    assert changed != key
    os.rename(tmp_path / "moved" / "cat", tmp_path / "moved" / "cow")
    assert open_source(tmp_path / "moved").fingerprint() not in (key, changed)
    assert open_source(tmp_path / "moved", max_pixels=9).fingerprint() not in (key, changed)


HOSTILE_NAMES = (
    b"<script>alert(1)</script>.png".replace(b"/", b"\\"),
    b"new\nline.png",
    b"\xff\xfe.png",
    b'quote".png',
    b"'; drop table.png",
    b"-rf.png",
    b"\x1b[31mred.png",
    b"%s%n.png",
    b"a" * 200 + b".png",
    b"back\\slash.png",
    "\u202egnp.png".encode(),
    "café.png".encode(),
)


def test_hostile_names(tmp_path):
    (tmp_path / "a").mkdir()
    content = save(tmp_path / "a" / "0.png", noise()).read_bytes()
    folder = os.fsencode(tmp_path / "a")
    for name in HOSTILE_NAMES:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    os.mkdir(os.fsencode(tmp_path) + b"/b\xff\n<b>")
    with open(os.fsencode(tmp_path) + b"/b\xff\n<b>/x.png", "wb") as file:
        file.write(content)
    source = open_source(tmp_path)
    assert len(source) == len(set(source.ids)) == len(HOSTILE_NAMES) + 2
    assert source.class_names == ("a", r"b\xff\u000a<b>")
    for text in (*source.ids, *source.class_names):
        assert text.isprintable()
        text.encode()
    assert len(everything(source).rows) == len(source) and not source.problems
    assert all(source.path(row).exists() for row in range(len(source)))
    source.fingerprint()


def test_links_are_not_followed_unless_asked_for(tmp_path):
    secret = class_folders(tmp_path / "outside", classes=("secret",))
    root = class_folders(tmp_path / "root")
    (root / "cat" / "link.png").symlink_to(secret / "secret" / "0.png")
    (root / "linked").symlink_to(secret / "secret")
    (root / "cat" / "loop").symlink_to(root)
    (root / "cat" / "self.png").symlink_to("self.png")
    (root / "cat" / "broken.png").symlink_to("nowhere.png")
    (root / "cat" / "notes.txt").symlink_to("/etc/hostname")
    source = open_source(root)
    assert len(source) == 6 and len(everything(source).rows) == 6
    links = {"cat/link.png", "linked", "cat/loop", "cat/self.png", "cat/broken.png"}
    assert reasons(source).keys() == links
    followed = open_source(root, follow_links=True)
    assert {"cat/link.png", "linked/0.png"} <= {*followed.ids}
    everything(followed)
    unread = reasons(followed)
    assert "itself" in unread["cat/loop/"]
    assert "not exist" in unread["cat/broken.png"]
    assert unread["cat/self.png"]


def test_a_folder_of_links_says_how_to_follow_them(tmp_path):
    class_folders(tmp_path / "real")
    (tmp_path / "links" / "cat").mkdir(parents=True)
    (tmp_path / "links" / "cat" / "0.png").symlink_to(tmp_path / "real" / "cat" / "0.png")
    with pytest.raises(ValueError, match="follow_links"):
        open_source(tmp_path / "links")
    assert len(open_source(tmp_path / "links", follow_links=True)) == 1
    # The folder itself is named by the user, and may be a link.
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(open_source(tmp_path / "link")) == 6


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    class_folders(tmp_path)
    (tmp_path / "cat" / "0.png").chmod(0)
    (tmp_path / "dog").chmod(0)
    try:
        source = open_source(tmp_path)
        everything(source)
        assert "permission" in reasons(source)["cat/0.png"]
        assert reasons(source)["dog/"]
        (tmp_path).chmod(0)
        with pytest.raises(PermissionError, match="permissions"):
            open_source(tmp_path)
    finally:
        tmp_path.chmod(0o700)
        (tmp_path / "dog").chmod(0o700)


def test_pipes_are_not_waited_for(tmp_path):
    class_folders(tmp_path)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    source = open_source(tmp_path)
    assert len(everything(source).rows) == 6
    assert reasons(source) == {"cat/pipe.png": "This is no regular file."}


def test_ten_thousand_classes(tmp_path):
    content = save(tmp_path / "seed.png", noise()).read_bytes()
    for number in range(10_000):
        folder = tmp_path / "root" / f"{number:05}"
        folder.mkdir(parents=True)
        if number % 50 == 0:
            (folder / "0.png").write_bytes(content)
    source = open_source(tmp_path / "root")
    assert len(source.class_names) == 200 and len(source.problems) == 9_800
    assert len(everything(source, batch_size=64).rows) == 200


def test_empty_and_missing_places_are_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; expected"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="leads nowhere"):
        open_source(tmp_path / "link")
    with pytest.raises(ValueError, match="no image that can be read"):
        (tmp_path / "empty").mkdir()
        open_source(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"cat/: The folder holds no images"):
        (tmp_path / "classes" / "cat").mkdir(parents=True)
        open_source(tmp_path / "classes")
    with pytest.raises(ValueError, match="give its folder"):
        open_source(save(tmp_path / "one" / "a.png", noise()))
    for name, advice in (("a.zip", "unpack"), ("a.txt", "expected a folder"), ("a", "expected")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=advice):
            open_source(tmp_path / name)
    for name in ("a.csv", "a.npz", "a.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match="no regular file"):
            open_source(tmp_path / name)
    with pytest.raises(TypeError, match="split must be"):
        open_source(tmp_path, split=0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="path is empty"):
        open_source("")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source("a" * 5000)
    with pytest.raises(ValueError, match="max_pixels must be at least 1"):
        open_source(tmp_path, max_pixels=0)


def test_one_image_is_enough(tmp_path):
    save(tmp_path / "a" / "0.png", noise())
    assert len(everything(open_source(tmp_path)).rows) == 1


def test_nothing_is_written(tmp_path):
    root = class_folders(tmp_path / "root")
    (root / "cat" / "bad.png").write_bytes(b"")
    before = snapshot(tmp_path)
    source = open_source(root)
    everything(source)
    source.image(0)
    source.fingerprint()
    assert snapshot(tmp_path) == before


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """A pass over 6 images of 6 megapixels takes less than 4 of them decoded."""
    for number in range(6):
        save(tmp_path / "a" / f"{number}.png", np.full((2000, 3000, 3), number, np.uint8))
    code = """if True:
        import resource, sys
        from jaxpoison.data import open_source
        source = open_source(sys.argv[1])
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        source.image(0, 32)
        before = peak()
        assert sum(len(batch.rows) for batch in source.batches(32, 2)) == 6
        print((peak() - before) / 1024)
    """
    result = run_code(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 4 * 24 * max(2, min(8, os.cpu_count() or 1)) / 2


# ---- arrays ----


@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_arrays(channels):
    shape = (5, 8, 8, channels) if channels else (5, 8, 8)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    source = Source.from_arrays(images, [0, 1, 2, 1, 0])
    assert source.ids == ("row 0", "row 1", "row 2", "row 3", "row 4")
    assert source.class_names == ("0", "1", "2") and source.path(0) is None
    got = everything(source)
    assert got.images.shape == (5, 8, 8, 3)
    if channels == 3:
        np.testing.assert_array_equal(got.images, images)
    if channels in (0, 1):
        np.testing.assert_array_equal(got.images, images.reshape(5, 8, 8, 1).repeat(3, 3))
    assert source.image(0, most=4).shape == (4, 4, 3)
    assert data.Source is Source


def test_arrays_have_the_digests_of_the_same_files(tmp_path):
    path = save(tmp_path / "a" / "0.png", noise())
    one = everything(open_source(tmp_path)).digests
    two = everything(Source.from_arrays(noise()[None], [0])).digests
    np.testing.assert_array_equal(one, two)
    assert path.exists()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays(dtype):
    images = noise()[None].repeat(4, 0)
    source = Source.from_arrays((images / 255).astype(dtype), [0, 1, 0, 1])
    np.testing.assert_allclose(everything(source).images, images, atol=dtype == np.float16)


def test_a_few_bad_pixels_are_problems_and_many_an_error():
    images = np.full((6, 8, 8, 3), 0.5, np.float32)
    images[1, 0, 0, 0] = np.nan
    images[4, 0, 0, 0] = 1.5
    source = Source.from_arrays(images, [0] * 6)
    np.testing.assert_array_equal(everything(source).rows, [0, 2, 3, 5])
    assert "NaN" in reasons(source)["row 1"] and "[0.5, 1.5]" in reasons(source)["row 4"]
    for bad in (images * 255, images - 1):
        with pytest.raises(ValueError, match=r"float pixels lie in .* Divide"):
            Source.from_arrays(bad, [0] * 6)


@pytest.mark.parametrize(
    ("images", "error", "reason"),
    [
        (np.zeros((5, 3, 8, 8), np.uint8), ValueError, r"look like \[N, C, H, W\]"),
        (np.zeros((5, 8, 8, 2), np.uint8), ValueError, "2 channels"),
        (np.zeros((5, 8, 8, 7), np.uint8), ValueError, "7 channels"),
        (np.zeros((8, 8, 3), np.uint8), ValueError, "single image"),
        (np.zeros((5, 64), np.uint8), ValueError, "reshape"),
        (np.zeros((5, 0, 8, 3), np.uint8), ValueError, "empty"),
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "empty|no labels|shape"),
        (np.full((5, 8, 8, 3), 300, np.int64), ValueError, "int64"),
        (np.full((5, 8, 8, 3), 9, np.uint16), ValueError, "uint16"),
        (np.zeros((5, 8, 8, 3), bool), ValueError, "bool"),
        (np.zeros((5, 8, 8, 3), np.complex64), ValueError, "complex64"),
        (np.array([None] * 5), TypeError, "objects"),
        ([noise(), noise(9, 9), noise(), noise(), noise()], TypeError, "one array"),
        ("images", (TypeError, ValueError), "images"),
        (None, TypeError, "images"),
    ],
)
def test_arrays_that_are_no_images(images, error, reason):
    with pytest.raises(error, match=reason):
        Source.from_arrays(images, [0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("labels", "want", "names"),
    [
        ([0, 1, 1], [0, 1, 1], "01"),
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
        ([b"dog", b"cat", b"dog"], [1, 0, 1], ("cat", "dog")),
        (np.eye(3)[[2, 0, 1]], [2, 0, 1], "012"),
        (np.array([0.0, 2.0, 1.0]), [0, 2, 1], "012"),
        ([3, 8, 3], [3, 8, 3], "012345678"),
        ([3, 10**12, 3], [0, 1, 0], ("3", "1000000000000")),
        ([True, False, True], [1, 0, 1], ("False", "True")),
        (["a\nb", "c", "c"], [0, 1, 1], (r"a\u000ab", "c")),
    ],
)
def test_labels(labels, want, names):
    source = Source.from_arrays(noise()[None].repeat(3, 0), labels)
    np.testing.assert_array_equal(source.labels, np.array(want, np.int32))
    assert source.labels.dtype == np.int32 and source.class_names == tuple(names)


@pytest.mark.parametrize(
    ("labels", "names", "reason"),
    [
        ([0, 1], None, "3 images but 2 labels"),
        ([0, -1, 1], None, "-1"),
        ([0, np.nan, 1], None, "missing|not finite"),
        ([0, 0.5, 1], None, "not whole"),
        ([0, None, 1], None, "missing"),
        ([[0, 1], [1, 1], [1, 0]], None, "one-hot"),
        ([0, 1, 5], ["a", "b"], "0 to 1"),
        ([0, 1, 0], ["a", "a"], "not all different"),
        (["a", "b", "z"], ["a", "b"], "none of the class names"),
    ],
)
def test_labels_that_are_no_classes(labels, names, reason):
    with pytest.raises(ValueError, match=reason):
        Source.from_arrays(noise()[None].repeat(3, 0), labels, class_names=names)


def test_names_and_ids_of_arrays():
    images = noise()[None].repeat(3, 0)
    source = Source.from_arrays(images, [0, 2, 2], ids=["x", "y", "z"], class_names=["a", "b", "c"])
    assert source.class_names == ("a", "b", "c") and source.ids == ("x", "y", "z")
    named = Source.from_arrays(images, ["c", "a", "a"], class_names=["a", "b", "c"])
    np.testing.assert_array_equal(named.labels, [2, 0, 0])
    for ids, reason in ((["x", "x", "y"], "occur twice"), (["x"], "3 images but 1 ids")):
        with pytest.raises(ValueError, match=reason):
            Source.from_arrays(images, [0, 1, 1], ids=ids)


def test_fingerprints_of_arrays():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    key = Source.from_arrays(images, [0, 1, 0, 1, 0]).fingerprint()
    assert key == Source.from_arrays(images.copy(), [0, 1, 0, 1, 0]).fingerprint()
    assert key != Source.from_arrays(images, [0, 1, 0, 1, 1]).fingerprint()
    changed = images.copy()
    changed[4, 7, 7, 2] ^= 1
    assert key != Source.from_arrays(changed, [0, 1, 0, 1, 0]).fingerprint()


# ---- .npz files ----


@pytest.mark.parametrize(
    "names",
    [
        ("images", "labels"), ("x", "y"), ("X", "y"), ("data", "targets"), ("arr_0", "arr_1"),
        ("x_train", "y_train"), ("train_images", "train_labels"), ("X_test", "Y_test"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz(tmp_path, names, write):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    write(tmp_path / "a.npz", **dict(zip(names, (images, [0, 1, 2, 1, 0]), strict=True)), z=1)
    source = open_source(tmp_path / "a.npz")
    np.testing.assert_array_equal(everything(source).images, images)
    np.testing.assert_array_equal(source.labels, [0, 1, 2, 1, 0])
    assert source.ids[3] == "row 3" and source.class_names == ("0", "1", "2")
    assert source.fingerprint() == open_source(tmp_path / "a.npz").fingerprint()


def test_stored_arrays_are_mapped_in_either_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 9, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=np.asfortranarray(images), labels=[0, 1, 2, 1, 0])
    source = open_source(tmp_path / "a.npz")
    assert isinstance(source._images._images, np.memmap)
    np.testing.assert_array_equal(source.image(3), images[3])


def test_npz_with_class_names(tmp_path):
    images = noise()[None].repeat(3, 0)
    np.savez(tmp_path / "a.npz", images=images, labels=[0, 2, 2], class_names=["a", "b", "c"])
    assert open_source(tmp_path / "a.npz").class_names == ("a", "b", "c")


def test_parts_of_npz_files_are_asked_for(tmp_path):
    images = noise()[None].repeat(3, 0)
    path = tmp_path / "a.npz"
    np.savez(path, x_train=images, y_train=[0, 1, 1], x_test=images[:1], y_test=[0])
    with pytest.raises(ValueError, match=r"several parts .*train.*split='train'"):
        open_source(path)
    assert len(open_source(path, split="train")) == 3
    assert len(open_source(path, split="test")) == 1
    assert open_source(path, split="train").fingerprint() != (
        open_source(path, split="test").fingerprint()
    )
    with pytest.raises(ValueError, match="no such arrays"):
        open_source(path, split="val")


def test_hostile_npz_files(tmp_path):
    images, path = noise()[None].repeat(3, 0), tmp_path / "a.npz"

    def refused(match, error=ValueError):
        before = snapshot(tmp_path)
        with pytest.raises(error, match=match):
            open_source(path)
        assert snapshot(tmp_path) == before

    np.savez(path, images=images, labels=[0, 1])
    refused("3 images but 2 labels")
    np.savez(path, images=images)
    refused("lacks images and labels")
    np.savez(path, images=images, labels=np.array(["a", None, "b"], object))
    refused("objects")
    np.savez(path, images=np.array([None] * 3, object), labels=[0, 1, 1])
    refused("objects")
    np.savez(path, images=images, labels=[0, 1, -1])
    refused("-1")
    np.savez(path, images=images, labels=[0, np.nan, 1])
    refused("not finite")
    np.savez(path, images=images.transpose(0, 3, 1, 2), labels=[0, 1, 1])
    refused(r"\[N, C, H, W\]")
    np.savez(path, images=images * 2.0, labels=[0, 1, 1])
    refused("float pixels lie in")
    np.savez(path, images=images, labels=[0, 1, 1])
    content = path.read_bytes()
    for share in (0, 0.3, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        refused("damaged")
    path.write_bytes(content.replace(b"(3, 8, 8, 3)", b"(9, 8, 8, 3)"))
    refused("damaged")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../images.npy", b"x")
        archive.writestr("labels.npy", b"x")
    refused("lacks images and labels")
    path.unlink()
    path.mkdir()
    refused("no image that can be read")


def test_a_stored_entry_that_points_elsewhere_is_refused(tmp_path):
    """The local header of a zip entry can lie about where its bytes start."""
    path = tmp_path / "a.npz"
    np.savez(path, images=noise()[None].repeat(3, 0), labels=[0, 1, 1])
    content = bytearray(path.read_bytes())
    content[28:30] = b"\xff\xff"  # the length of the extra field of the first entry
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        open_source(path)


# ---- tables of paths ----


def table(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "path,label\ncat/0.png,cat\ndog/1.png,dog\n",
        "\ufefffile_name;class\r\ncat/0.png;cat\r\ndog/1.png;dog\r\n",
        "id\tImage\t Label\n1\t./cat/0.png\tcat\n2\tcat/../dog/1.png\tdog\n",
        '"label","filename"\n"cat","cat/0.png"\n\n" dog ","dog/1.png"',
    ],
)
def test_csv(tmp_path, text):
    class_folders(tmp_path)
    source = open_source(table(tmp_path / "a.csv", text))
    assert source.ids == ("cat/0.png", "dog/1.png") and source.class_names == ("cat", "dog")
    np.testing.assert_array_equal(source.labels, np.array([0, 1], np.int32))
    assert source.labels.dtype == np.int32 and not source.problems
    np.testing.assert_array_equal(everything(source).images, [noise(seed=0), noise(seed=101)])
    assert source.path(1) == tmp_path / "dog" / "1.png"


def test_csv_with_columns_and_root_by_name(tmp_path):
    class_folders(tmp_path / "images")
    path = table(tmp_path / "a.csv", "a,b\ncat/0.png,1\ndog/1.png,0\n")
    with pytest.raises(ValueError, match=r"usual name.*'a', 'b'.*image_column"):
        open_source(path)
    with pytest.raises(ValueError, match="label_column is 'z'"):
        open_source(path, image_column="a", label_column="z")
    columns = {"image_column": "a", "label_column": "b"}
    with pytest.raises(ValueError, match=r"or in root.*not exist"):
        open_source(path, **columns)
    source = open_source(path, root=tmp_path / "images", **columns)
    assert source.ids == ("cat/0.png", "dog/1.png") and source.class_names == ("0", "1")
    np.testing.assert_array_equal(source.labels, [1, 0])
    absolute = table(tmp_path / "b.csv", f"path,label\n{tmp_path}/images/dog/1.png,0\n")
    assert open_source(absolute).ids == ("images/dog/1.png",)
    with pytest.raises(ValueError, match="no folder"):
        open_source(path, root=tmp_path / "nowhere", **columns)
    with pytest.raises(ValueError, match="without parts"):
        open_source(path, split="train", **columns)


def test_hostile_rows_of_a_table_are_problems(tmp_path):
    class_folders(tmp_path / "root")
    secret = save(tmp_path / "secret.png", noise())
    (tmp_path / "root" / "link.png").symlink_to(secret)
    (tmp_path / "root" / "up").symlink_to(tmp_path)
    rows = {
        "cat/nothing.png,cat": "not exist",
        "cat/0.png/x,cat": "cannot be followed",
        "../secret.png,cat": "leads out",
        "cat/../../secret.png,cat": "leads out",
        f"{secret},cat": "leads out",
        "/etc/passwd,cat": "leads out",
        "link.png,cat": "symbolic link",
        "up/secret.png,cat": "symbolic link",
        "up/../../secret.png,cat": "leads out",
        "cat,cat": "folder",
        ",cat": "names no image",
        "cat/1.png,": "no label",
        "cat/1.png": "fields",
        "cat/1.png,cat,dog": "fields",
        "a\0b.png,cat": "zero byte",
        f"{'a' * 5000}.png,cat": "cannot be followed",
        "http://localhost/x.png,cat": "not exist",
    }
    text = "path,label\n" + "".join(f"{row}\n" for row in rows) + "dog/0.png,dog\n"
    source = open_source(table(tmp_path / "root" / "a.csv", text))
    assert source.ids == ("dog/0.png",) and len(everything(source).rows) == 1
    by_row = {int(name.split()[1]): reason for name, reason in source.problems}
    assert sorted(by_row) == list(range(len(rows)))
    for row, reason in enumerate(rows.values()):
        assert reason in by_row[row], (row, by_row[row])
    followed = open_source(tmp_path / "root" / "a.csv", follow_links=True)
    assert {"link.png", "up/secret.png"} <= {*followed.ids}


def test_labels_of_tables(tmp_path):
    class_folders(tmp_path)

    def opened(*labels):
        rows = (f"cat/{number % 3}.png,{label}\n" for number, label in enumerate(labels))
        return open_source(table(tmp_path / "a.csv", "path,label\n" + "".join(rows)))

    numbers = opened("0", "10", "2.0", "nan", "-1", "1.5", "1e400")
    assert numbers.class_names == tuple(map(str, range(11)))
    np.testing.assert_array_equal(numbers.labels, [0, 10, 2])
    found = [reason for _, reason in numbers.problems]
    assert "no label" in found[0] and "-1" in found[1] and "1.5" in found[2] and "inf" in found[3]
    texts = opened("cat", "7", "nan")
    assert texts.class_names == ("7", "cat", "nan")
    assert opened("<script>", "a\x1bb").class_names == ("<script>", r"a\u001bb")
    with pytest.raises(ValueError, match="no row has a class"):
        opened("", "")
    with pytest.raises(ValueError, match=r"no row has a class.*0\.5 is no class"):
        opened("0.5", "0.25")


def test_the_same_image_in_several_rows_and_other_bytes(tmp_path):
    class_folders(tmp_path)
    name = os.fsencode(tmp_path) + b"/\xff.png"
    with open(name, "wb") as file:
        file.write((tmp_path / "cat" / "0.png").read_bytes())
    text = b"path,label\ncat/0.png,cat\ncat/0.png,dog\n\xff.png,dog\n"
    source = open_source(table(tmp_path / "a.csv", text))
    assert source.ids == ("cat/0.png", "cat/0.png (row 1)", r"\xff.png")
    assert len(everything(source).rows) == 3 and not source.problems


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "no column"),
        (b"\n", "no column"),
        (b"path,label\n", "no row has a class"),
        (b"cat/0.png,cat\n", "no column"),
        (b"path,size\ncat/0.png,1\n", "label_column"),
        (b"\x89PNG\r\n\x1a\n\0\0", "no column"),
        (b'path,label\n"cat/0.png,cat\n', "no table"),
        (b"path,label\n" + b"a" * 200_000 + b",cat\n", "no table"),
        (b"\xff\xfep\0a\0t\0h\0", "no column"),
    ],
)
def test_files_that_are_no_tables(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        open_source(table(tmp_path / "a.csv", text))


def test_options_of_tables_are_refused_elsewhere(tmp_path):
    class_folders(tmp_path)
    for name in ("root", "image_column", "label_column"):
        with pytest.raises(ValueError, match=rf"{name} is 'x', but .* is no table"):
            open_source(tmp_path, **{name: "x"})


# ---- Parquet and Hugging Face ----


def encoded(seed=0, size=8):
    stream = io.BytesIO()
    Image.fromarray(noise(size, size, seed=seed)).save(stream, "png")
    return stream.getvalue()


HF_FEATURES = {
    "img": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": ["cat", "dog"]},
    "note": {"_type": "Value", "dtype": "string"},
}


def hf_table(labels, images=None):
    """Returns a table as Hugging Face's datasets makes it."""
    pa = pytest.importorskip("pyarrow")
    if images is None:
        images = [{"bytes": encoded(row), "path": None} for row in range(len(labels))]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table(
        {
            "img": pa.array(images, kind),
            "label": pa.array(labels, pa.int64()),
            "note": pa.array(["x"] * len(labels)),
        }
    )


def write_parquet(path, table, **options):
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, **options)
    return path


def save_to_disk(folder, tables, features=HF_FEATURES):
    """Writes what `Dataset.save_to_disk` writes, one file for each table."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{n:05}-of-{len(tables):05}.arrow" for n in range(len(tables))]
    for name, part in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as w:
            w.write_table(part, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


@pytest.mark.parametrize("row_group_size", [1, 3, 100])
def test_parquet_with_images_inside(tmp_path, row_group_size):
    labels = [0, 1, None, 1, -1, 0, 1]
    whole = hf_table(labels).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": HF_FEATURES}})}
    )
    path = write_parquet(tmp_path / "a.parquet", whole, row_group_size=row_group_size)
    source = open_source(path)
    assert source.ids == ("row 0", "row 1", "row 3", "row 5", "row 6")
    assert source.class_names == ("cat", "dog")
    np.testing.assert_array_equal(source.labels, [0, 1, 1, 0, 1])
    assert reasons(source).keys() == {"row 2", "row 4"}
    want = np.stack([noise(seed=seed) for seed in (0, 1, 3, 5, 6)])
    np.testing.assert_array_equal(everything(source, batch_size=2).images, want)
    for row in (4, 0, 2, 2):
        np.testing.assert_array_equal(source.image(row), want[row])
    assert source.path(0) is None
    assert source.fingerprint() == open_source(path).fingerprint()


def test_parquet_of_bytes_and_of_paths(tmp_path):
    pa = pytest.importorskip("pyarrow")
    class_folders(tmp_path)
    inside = pa.table({"image": [encoded(0), b"", None, encoded(3)], "class": list("abab")})
    source = open_source(write_parquet(tmp_path / "a.parquet", inside))
    np.testing.assert_array_equal(everything(source).rows, [0, 3])
    assert "empty" in reasons(source)["row 1"] and "no image" in reasons(source)["row 2"]
    paths = pa.table({"path": ["cat/0.png", "../x.png", None], "label": [1.0, 0.0, np.nan]})
    source = open_source(write_parquet(tmp_path / "b.parquet", paths))
    assert source.ids == ("cat/0.png",) and len(source.problems) == 2
    outside = [{"bytes": None, "path": path} for path in ("cat/0.png", "/etc/passwd", "../a.png")]
    source = open_source(write_parquet(tmp_path / "c.parquet", hf_table([0, 1, 1], outside)))
    np.testing.assert_array_equal(everything(source).rows, [0])
    assert "leads out" in reasons(source)["row 1"] and "leads out" in reasons(source)["row 2"]


def test_folders_of_parquet(tmp_path):
    whole = hf_table([0, 1, 1, 0])
    write_parquet(tmp_path / "one" / "data" / "train-00000-of-00002.parquet", whole.slice(0, 3))
    write_parquet(tmp_path / "one" / "data" / "train-00001-of-00002.parquet", whole.slice(3))
    source = open_source(tmp_path / "one")
    np.testing.assert_array_equal(everything(source).images[3], noise(seed=3))
    np.testing.assert_array_equal(source.image(3), noise(seed=3))
    write_parquet(tmp_path / "one" / "data" / "test-00000-of-00001.parquet", whole)
    with pytest.raises(ValueError, match=r"several parts .*split='t"):
        open_source(tmp_path / "one")
    assert len(open_source(tmp_path / "one", split="test")) == 4
    with pytest.raises(ValueError, match="no such files"):
        open_source(tmp_path / "one", split="val")
    write_parquet(tmp_path / "two" / "train" / "0.parquet", whole)
    write_parquet(tmp_path / "two" / "test" / "0.parquet", whole.slice(0, 2))
    assert len(open_source(tmp_path / "two", split="train")) == 4
    write_parquet(tmp_path / "three" / "a.parquet", whole)
    write_parquet(tmp_path / "three" / "b.parquet", whole.rename_columns(["image", "label", "n"]))
    with pytest.raises(ValueError, match="unlike others"):
        open_source(tmp_path / "three")


def test_hostile_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    plain = {"compression": "none", "use_dictionary": False}
    path = tmp_path / "a.parquet"
    write_parquet(path, hf_table([0, 1] * 40), row_group_size=10, **plain)
    content = path.read_bytes()
    for share in (0, 0.2, 0.99):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match="no Parquet file or damaged"):
            open_source(path)
    with pytest.raises(ValueError, match="expected encoded images"):
        open_source(write_parquet(path, pa.table({"image": [[0, 1]], "label": [0]})))
    with pytest.raises(ValueError, match="usual name"):
        open_source(write_parquet(path, pa.table({"a": ["b"]})))
    with pytest.raises(ValueError, match="no row has a class"):
        open_source(write_parquet(path, pa.table({"image": [b"x"], "label": [[1, 2]]})))
    with pytest.raises(ValueError, match="no row has a class"):
        open_source(write_parquet(path, pa.table({"image": [b"x"], "label": [None]})))
    # Damage within: the images of a group are lost from there on, and the others are not.
    path.write_bytes(content)
    damaged = bytearray(content)
    start = content.index(encoded(35)[:60])
    damaged[start - 400 : start + 400] = bytes(800)
    path.write_bytes(damaged)
    source = open_source(path)
    rows = everything(source).rows
    assert {*range(30), *range(40, 80)} <= {*rows.tolist()} and len(source.problems) > 0
    assert len(rows) + len(source.problems) == 80


def test_random_damage_to_tables_gives_value_errors_or_problems(tmp_path):
    rng = np.random.default_rng(0)
    parquet = write_parquet(tmp_path / "a.parquet", hf_table([0, 1, 0, 1]))
    saved = save_to_disk(tmp_path / "saved", [hf_table([0, 1, 0, 1])])
    for place, file in ((parquet, parquet), (saved, saved / "data-00000-of-00001.arrow")):
        content = file.read_bytes()
        for _ in range(100):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[rng.integers(0, len(damaged), 3)] = rng.integers(0, 256, 3)
            file.write_bytes(damaged.tobytes())
            with contextlib.suppress(ValueError):
                list(open_source(place).batches(8, 4))


def test_hugging_face_on_disk(tmp_path):
    whole = hf_table([0, 1, 1, 0, -1])
    source = open_source(save_to_disk(tmp_path / "one", [whole.slice(0, 3), whole.slice(3)]))
    assert source.class_names == ("cat", "dog") and len(source) == 4
    np.testing.assert_array_equal(source.labels, [0, 1, 1, 0])
    want = np.stack([noise(seed=seed) for seed in range(4)])
    np.testing.assert_array_equal(everything(source).images, want)
    np.testing.assert_array_equal(source.image(3), want[3])
    assert "-1" in reasons(source)["row 4"]
    with pytest.raises(ValueError, match="without parts"):
        open_source(tmp_path / "one", split="train")
    for name in ("train", "validation"):
        save_to_disk(tmp_path / "dict" / name, [whole])
    index = tmp_path / "dict" / "dataset_dict.json"
    index.write_text('{"splits": ["train", "validation"]}')
    with pytest.raises(ValueError, match=r"several parts .*split='train'"):
        open_source(tmp_path / "dict")
    assert len(open_source(tmp_path / "dict", split="val")) == 4
    with pytest.raises(ValueError, match="no such part"):
        open_source(tmp_path / "dict", split="test")
    before = snapshot(tmp_path)
    everything(open_source(tmp_path / "dict", split="train"))
    assert snapshot(tmp_path) == before


def test_hostile_hugging_face_folders(tmp_path):
    pa = pytest.importorskip("pyarrow")
    whole = hf_table([0, 1, 1])
    folder = save_to_disk(tmp_path / "one", [whole])
    arrow, state = folder / "data-00000-of-00001.arrow", folder / "state.json"

    def refused(match):
        with pytest.raises(ValueError, match=match):
            open_source(folder)

    content = arrow.read_bytes()
    for share in (0, 0.1, 0.6):
        arrow.write_bytes(content[: int(len(content) * share)])
        refused("damaged")
    arrow.unlink()
    refused("damaged")
    save_to_disk(folder, [pa.table({"text": ["a"], "number": [1]})], {})
    refused("usual name")
    save_to_disk(folder, [pa.table({"image": [[0, 1]], "label": [1]})], {})
    refused("expected encoded images")
    for name in ("../../secret.arrow", "/etc/passwd", "", "..", 7, None):
        state.write_text(json.dumps({"_data_files": [{"filename": name}]}))
        refused("not a file next to it")
    for text, match in (
        ("", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"_data_files": []}', "no rows"),
        ('{"_data_files": [3]}', "damaged"),
        ('{"_data_files": [{"filename": "a"}], "_indices_data_files": [1]}', "flatten_indices"),
        ("[" * 100_000, "damaged"),
    ):
        state.write_text(text)
        refused(match)
    for text, match in (
        ('{"splits": ["../one"]}', "not a file next to it"),
        ('{"splits": []}', "no splits"),
        ('{"splits": 3}', "no splits"),
    ):
        (folder / "dataset_dict.json").write_text(text)
        refused(match)


def test_features_that_make_no_sense_are_ignored(tmp_path):
    for features in (None, 3, [], {"img": 3}, {"label": {"_type": "ClassLabel", "names": 5}}):
        folder = save_to_disk(tmp_path / "a", [hf_table([0, 1, 2])], features)
        assert open_source(folder).class_names == ("0", "1", "2")
    folder = save_to_disk(tmp_path / "a", [hf_table([0, 1, 2])])
    assert "0 to 1" in reasons(open_source(folder))["row 2"]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", hf_table([0]))
    folder = save_to_disk(tmp_path / "b", [hf_table([0])])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for place in (path, folder):
        with pytest.raises(ImportError, match=r"jaxpoison\[audit\]"):
            open_source(place)


# ---- tensorflow-datasets ----


@pytest.mark.filterwarnings("ignore:.* images in .*, officially:UserWarning")
def test_folders_of_tensorflow_datasets(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28, 1), np.uint8)
    labels = (np.arange(30) % 10).astype(np.int32)
    for part, rows in (("train", slice(20)), ("t10k", slice(20, 30))):
        for kind, magic, values in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
            values = values[rows].squeeze().astype(np.uint8)
            header = np.array([magic, *values.shape], ">u4").tobytes()
            table(tmp_path / f"{part}-{kind}-ubyte", header + values.tobytes())
    prepare.prepare("mnist", tmp_path / "out", archives_dir=tmp_path)
    folder = tmp_path / "out" / "mnist"
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"several parts .*split='t"):
        open_source(folder)
    source = open_source(folder, split="train")
    assert len(source) == 20 and source.class_names == tuple("0123456789")
    np.testing.assert_array_equal(np.bincount(source.labels), [2] * 10)
    got = everything(source, size=28).images
    assert {image.tobytes() for image in got} == {
        np.repeat(image, 3, axis=2).tobytes() for image in images[:20]
    }
    np.testing.assert_array_equal(source.image(3), got[3])
    assert source.fingerprint() == open_source(folder, split="train").fingerprint()
    for options, match in (
        ({"split": "val"}, "no such part"),
        ({"split": "test", "label_column": "image"}, "label_column"),
    ):
        with pytest.raises(ValueError, match=match):
            open_source(folder, **options)
    assert snapshot(tmp_path) == before
