"""The three maps of a convolution, by each of the ways that `models.convolution` has on CPU.

  python benchmarks/convolution.py

Of each shape: the value, the gradient to the image and the gradient to the kernel; by what is
chosen, with and without the oneDNN inside jaxlib, by XLA's own convolution, and by patches in one
matrix product.
"""

import argparse
import functools
from unittest import mock

import jax
import measure

from jaxpoison.models import convolution
from jaxpoison.models.convolution import Window

# Image's side, channels, features, kernel's side, stride, padding.
SHAPES = (
    (32, 8, 8, 3, 1, 1),
    (32, 16, 16, 3, 1, 1),
    (16, 32, 32, 3, 1, 1),
    (8, 64, 64, 3, 1, 1),
    (4, 128, 128, 3, 1, 1),
    (32, 64, 64, 3, 1, 1),
    (15, 128, 128, 3, 1, 1),
    (7, 256, 256, 3, 1, 1),
    (32, 3, 16, 3, 1, 1),
    (32, 16, 32, 3, 2, 1),
    (32, 64, 128, 3, 2, 1),
    (32, 16, 32, 1, 2, 0),
    (28, 1, 40, 5, 1, 0),
    (12, 40, 100, 5, 1, 0),
)
XLA = convolution._xla_value, convolution._xla_image_gradient, convolution._xla_kernel_gradient
PATCHES = (
    convolution._value_of_patches,
    convolution._image_gradient_of_patches,
    functools.partial(
        convolution._kernel_gradient_of_patches, contract=convolution._contract_on_cpu
    ),
)
CHOSEN = convolution._value, convolution._image_gradient, convolution._kernel_gradient


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128, help="batch size")
    measure.add_arguments(parser)
    parser.set_defaults(rounds=5, sample_seconds=0.1)
    options = parser.parse_args()
    contenders = [each for shape in SHAPES for each in maps_of(shape, options.batch)]
    result = measure.race(contenders, rounds=options.rounds, sample_seconds=options.sample_seconds)
    measure.finish("convolution.py", options, result)


def maps_of(shape: tuple[int, ...], batch_size: int) -> list[measure.Contender]:
    """Returns the contenders of one shape."""
    side, channels, features, size, stride, padding = shape
    window = Window((side, side), (size, size), (stride, stride), ((padding, padding),) * 2)
    keys = jax.random.split(jax.random.key(0), 3)
    image = jax.random.normal(keys[0], (batch_size, side, side, channels))
    kernel = jax.random.normal(keys[1], (size, size, channels, features))
    output = jax.random.normal(keys[2], (batch_size, *window.output, features))
    flops = 2.0 * output.size * size**2 * channels
    maps = {
        "value": (0, (image, kernel)),
        "to the image": (1, (output, kernel)),
        "to the kernel": (2, (image, output)),
    }
    found = []
    for name, (which, operands) in maps.items():
        work = f"{side}x{side}, {channels} to {features}, {size}x{size}, stride {stride}: {name}"

        def add(by, form, work=work, operands=operands):
            program = measure.compiled(lambda a, b: form(a, b, window), *operands)
            found.append(measure.contender(work, by, program, flops=flops, items=batch_size))

        add(measure.OURS, CHOSEN[which])
        with mock.patch.object(convolution, "_library_is_there", lambda: False):
            add("without oneDNN", CHOSEN[which])
        add("XLA", XLA[which])
        add("patches", PATCHES[which])
    return found


if __name__ == "__main__":
    main()
