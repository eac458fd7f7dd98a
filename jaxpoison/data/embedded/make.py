"""Writes the images that ship with the package.

    python -m jaxpoison.data.embedded.make --data-dir ~/tensorflow_datasets

Takes about two minutes for both data sets. The choice of images depends on a fixed seed only;
equal versions of Pillow (libwebp) and zlib write equal bytes.
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np

from jaxpoison.core.files import check_writable, replacing
from jaxpoison.data import catalogue
from jaxpoison.data.dataset import Dataset
from jaxpoison.data.embedded import COLUMNS
from jaxpoison.data.readers import read

SEED = 20_091
WEBP_METHOD = 6  # effort of libwebp, 0 to 6: the smallest files, and the slowest to write
NUM_IMAGES = {
    "cifar10": {"train": 3_000, "test": 1_000},
    "mnist": {"train": 5_500, "test": 2_000},
}
# The copy of CIFAR-10 from which the shipped files were made has these test images as JPEG
# copies, not bit for bit; they are left out so that every shipped image is exact.
INEXACT_CIFAR10_TEST = (
    *(1259, 1369, 1422, 1556, 2245, 2737, 2935, 3630, 3695, 3718, 4085, 4496),
    *(5791, 5896, 6286, 7580, 7707, 7724, 7832, 8117, 8541, 8551, 9254),
)


def choose_balanced(
    labels: np.ndarray, num_images: int, exclude: tuple[int, ...], seed: int
) -> np.ndarray:
    """Returns sorted indices of `num_images` random examples, equally many of each class.

    Args:
        labels: int32 [N].
        num_images: a multiple of the number of classes present in `labels`.
        exclude: indices that may not be chosen.
        seed: of the choice.

    Returns:
        int64 [num_images], ascending.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[~np.isin(order, exclude)]
    classes = np.unique(labels)
    per_class = num_images // len(classes)
    return np.sort(np.concatenate([order[labels[order] == c][:per_class] for c in classes]))


def encode_sheet(images: np.ndarray) -> bytes:
    """Returns a lossless WebP sheet of uint8 images [N, H, W, C]; COLUMNS must divide N.

    One sheet takes 77% of the bytes of a PNG sheet of CIFAR-10, and 90% of one of MNIST.
    """
    from PIL import Image

    _, height, width, channels = images.shape
    grid = images.reshape(-1, COLUMNS, height, width, channels).swapaxes(1, 2)
    pixels = grid.reshape(-1, COLUMNS * width, channels)
    sheet = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    buffer = io.BytesIO()
    sheet.save(buffer, format="WEBP", lossless=True, quality=100, method=WEBP_METHOD)
    return buffer.getvalue()


def write_labels(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a compressed .npz file with a fixed time stamp, so that its bytes never change."""
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            member = zipfile.ZipInfo(f"{key}.npy")  # dated 1980-01-01
            archive.writestr(member, buffer.getvalue(), zipfile.ZIP_DEFLATED)


def make(name: str, parts: dict[str, Dataset], out_dir: Path, num_images: dict[str, int]) -> None:
    """Writes the sheets and the labels of one data set.

    Args:
        name: "cifar10" or "mnist".
        parts: the full "train" and "test" set, in the order in which `readers.read` gives them.
        out_dir: where to write.
        num_images: how many images of each part to take.
    """
    arrays = {}
    for part, dataset in parts.items():
        exclude = INEXACT_CIFAR10_TEST if (name, part) == ("cifar10", "test") else ()
        indices = choose_balanced(dataset.labels, num_images[part], exclude, SEED)
        sheet = out_dir / f"{name}-{part}.webp"
        with replacing(sheet) as file:
            file.write(encode_sheet(dataset.images[indices]))
        arrays[f"{part}_labels"] = dataset.labels[indices].astype(np.uint8)
        arrays[f"{part}_indices"] = indices.astype(np.uint16)
        print(f"{sheet}: {len(indices)} images, {sheet.stat().st_size:,} bytes")
    write_labels(out_dir / f"{name}-labels.npz", arrays)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", help="TFDS folder with cifar10 and mnist (as for load)")
    parser.add_argument("--out-dir", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    out_dir = check_writable(arguments.out_dir)
    for name in catalogue.ENTRIES:
        original = read(name, data_dir=arguments.data_dir)
        parts = {"train": original.train, "test": original.test}
        make(name, parts, out_dir, NUM_IMAGES[name])


if __name__ == "__main__":
    main()
