"""The doors of `data`: labels of all kinds, and what a user gives where a Dataset is expected."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from programs import run_code

from jaxpoison import attacks, data
from jaxpoison.data import labels, pixels

NAMES = np.array(["cat", "dog", "frog"])[np.arange(9) % 3]
NUMBERS = np.arange(9) % 3


@pytest.mark.parametrize(
    "column",
    [
        NAMES,
        NAMES.tolist(),
        tuple(NAMES),
        NAMES.astype(object),
        NAMES.astype(np.dtypes.StringDType()),
        pd.Series(NAMES),
        pd.Series(NAMES, index=np.arange(9)[::-1]),
        pd.Series(NAMES, dtype="string"),
        pd.Series(NAMES).astype("category"),
        pd.Categorical(NAMES, categories=["frog", "dog", "cat", "never seen"]),
        pd.DataFrame({"label": NAMES}).label,
    ],
    ids=lambda column: type(column).__name__,
)
def test_strings_in_any_container_have_the_same_classes(column):
    positions, classes = labels.encode(column)
    assert positions.dtype == np.int32 and classes.tolist() == ["cat", "dog", "frog"]
    np.testing.assert_array_equal(positions, NUMBERS)
    with pytest.raises(ValueError, match=r"strings such as cat; .*np\.unique\(labels"):
        labels.as_class_numbers(column)


@pytest.mark.parametrize(
    "column",
    [
        *(NUMBERS.astype(kind) for kind in (np.int8, np.uint8, np.int64, np.uint64, np.float32)),
        NUMBERS.astype(object),
        NUMBERS.astype(float).tolist(),
        [jnp.int32(number) for number in NUMBERS],
        jnp.asarray(NUMBERS),
        np.ma.array(NUMBERS),  # nothing of it is masked
        pd.Series(NUMBERS, dtype="Int64"),
        pd.Series(NUMBERS).astype("category"),
        np.eye(3)[NUMBERS],
        np.eye(3, dtype=bool)[NUMBERS].tolist(),
        pd.get_dummies(pd.Series(NAMES)),
    ],
    ids=lambda column: f"{type(column).__name__}-{getattr(column, 'dtype', '')}",
)
def test_numbers_in_any_container_are_class_numbers(column):
    numbers = labels.as_class_numbers(column, 3)
    assert isinstance(numbers, np.ndarray) and numbers.dtype == np.int32
    np.testing.assert_array_equal(numbers, NUMBERS)
    positions, classes = labels.encode(column)
    np.testing.assert_array_equal(classes[positions], NUMBERS)


def test_int32_labels_are_not_copied():
    numbers = NUMBERS.astype(np.int32)
    assert labels.as_class_numbers(numbers) is numbers


def test_booleans_are_two_classes():
    np.testing.assert_array_equal(labels.as_class_numbers([True, False]), [1, 0])
    positions, classes = labels.encode(np.array([True, False, True]))
    assert classes.tolist() == [False, True] and positions.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "ids",
    [
        [2084071, 15075141, 1440764, 2084071],  # WordNet
        [2**63, 2**64 - 1, 0, 2**63],  # hashes, which int64 and float64 would change
        [-(2**63), 2**63 - 1, 7, 7],
    ],
)
@pytest.mark.parametrize("container", [list, lambda ids: np.array(ids, object)])
def test_large_and_sparse_ids_keep_their_values(ids, container):
    # The span of the ids exceeds all memory: nothing may depend on it.
    positions, classes = labels.encode(container(ids))
    assert [int(one) for one in classes[positions]] == ids
    assert classes.tolist() == sorted(set(ids))
    with pytest.raises(ValueError, match="out of range, the first is label"):
        labels.as_class_numbers(container(ids), 10)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0.5, 1.5], "2 labels are not whole numbers, the first is 0.5 of example 0"),
        ([0.0, np.nan], "1 labels are missing, the first is nan of example 1"),
        (np.array([0, np.nan, np.inf]), "2 labels are not finite, the first is nan of example 1"),
        (["cat", None], "1 labels are missing, the first is None of example 1"),
        (pd.Series([1, None], dtype="Int64"), "the first is nan of example 1"),
        (pd.Series(["cat", None]).astype("category"), "missing, the first is nan of example 1"),
        (pd.Series(["cat", pd.NA], dtype="string"), "missing, the first is .* of example 1"),
        ([3, "cat"], "several kinds, int for example 0 and str for example 1"),
        ([[0], [1, 2]], "example 0 has a list"),
        (np.ma.array([1, 2, 3], mask=[0, 1, 0]), "1 labels are masked, the first at example 1"),
        (np.array([2.0**25], np.float32), r"too large for float32.*read them as integers"),
        ([2**64], "do not fit in 64 bits"),
        ([-1, 2**63], "do not fit in 64 bits"),
        (np.array(["2020-01-01"], "M8[D]"), r"dtype datetime64\[D\]"),
        ([], r"labels have shape \(0,\)"),
        (np.zeros((2, 2, 2)), r"labels have shape \(2, 2, 2\)"),
        (np.full((3, 2), 0.5), "one-hot rows with a single 1: row 0 is none"),
        (np.array([[1, 0], [1, 1]]), "row 1 is none"),
        (np.ones((4, 1)), r"a column of shape \(4, 1\); expected \[N\]\. Use y\[:, 0\]$"),
        ([[3], [1]], r"Use np\.asarray\(y\)\[:, 0\]$"),
    ],
)
def test_labels_that_are_none_are_refused_by_the_first(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        labels.encode(bad)
    with pytest.raises(ValueError):
        labels.as_class_numbers(bad)
    assert str(error.value).startswith("y: ") and len(str(error.value)) < 250


@pytest.mark.parametrize("bad", [3, "cat", {"cat": 1}, None, iter([1]), attacks, object()])
def test_what_is_no_sequence_is_a_type_error(bad):
    with pytest.raises(TypeError, match=r"^trusted labels: got a .*; expected \[N\] labels"):
        labels.encode(bad, "trusted labels")


def test_traced_labels_are_refused():
    for read in (labels.encode, labels.as_class_numbers):
        with pytest.raises(TypeError, match="labels are traced; read them on the host"):
            jax.jit(read)(jnp.arange(3))


def test_the_range_is_checked_before_the_cast():
    for dtype in (np.int64, np.uint64):
        with pytest.raises(
            ValueError, match="1 labels out of range, the first is label 4294967299"
        ):
            labels.as_class_numbers(np.array([1, 2**32 + 3], dtype), 10)
    with pytest.raises(ValueError, match=r"label -1 of example 1; expected 0 to 2"):
        labels.as_class_numbers(np.array([0, -1], np.int8), 3)
    with pytest.raises(ValueError, match=r"label 2147483648 of example 0; expected 0, 1, 2"):
        labels.as_class_numbers([2**31])


def test_labels_do_not_import_pandas():
    code = (
        "import sys, numpy as np\nfrom jaxpoison.data import labels\n"
        "labels.encode(np.array(['a', 'b'], object))\nassert 'pandas' not in sys.modules"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr


# ---- check: advice that is right when it is followed ----

IMAGES = np.random.default_rng(0).integers(0, 256, (9, 5, 6, 3), np.uint8)
GOOD = data.Dataset(IMAGES, NUMBERS.astype(np.int32))


def advised(dataset, start="", num_classes=None):
    """Returns `dataset` with the expression in the error's advice carried out."""
    with pytest.raises(ValueError) as error:
        data.check(dataset, num_classes, "poisoned set")
    message = str(error.value)
    assert message.startswith("poisoned set: ")
    expression = message[message.rindex(start) + len(start) :].split("; their shape")[0]
    where = {"images": dataset.images, "labels": dataset.labels, "np": np, "data": data}
    return eval(expression, where)


def test_channels_first_are_recognized():
    for channels in (1, 3):
        first = IMAGES[..., :channels].transpose(0, 3, 1, 2)
        followed = advised(GOOD._replace(images=first), "use ")
        np.testing.assert_array_equal(followed, IMAGES[..., :channels])
        data.check(GOOD._replace(images=followed))
    with pytest.raises(ValueError, match=r"images look like \[N, C, H, W\]; use images\.tr"):
        data.check(data.Dataset(np.zeros((4, 3, 32, 32), np.uint8), np.zeros(4, np.int32)))


@pytest.mark.parametrize("shape", [(9, 3, 3, 3), (9, 1, 6, 1), (9, 3, 5, 1), (9, 1, 1, 64)])
def test_small_images_with_channels_last_pass(shape):
    data.check(GOOD._replace(images=np.zeros(shape, np.uint8)))


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.uint32])
def test_integer_images_of_8_bits(dtype):
    followed = advised(GOOD._replace(images=IMAGES.astype(dtype)), "use ")
    np.testing.assert_array_equal(followed, IMAGES)
    assert followed.dtype == np.uint8


def test_16_bit_images_do_not_wrap():
    wide = IMAGES.astype(np.uint16) * 257
    followed = advised(GOOD._replace(images=wide), "instance ")
    np.testing.assert_allclose(followed, IMAGES / 255, atol=1e-6)
    data.check(GOOD._replace(images=followed))


def test_images_in_double_precision_and_binary_ones():
    for images in (IMAGES / 255, (IMAGES / 255).astype(np.float16), IMAGES > 99):
        followed = advised(GOOD._replace(images=images), "Use ")
        np.testing.assert_allclose(followed, images.astype(float), atol=1e-7)
        data.check(GOOD._replace(images=followed))
    # 0 and 1 as integers may be black and white, or nearly black: the message leaves the choice.
    with pytest.raises(ValueError, match=r"If 1 is white, make them float32; if 255 is, uint8$"):
        data.check(GOOD._replace(images=(IMAGES > 99).astype(np.int64)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.astype(np.int16) - 300, r"images are int16; .*lie in -300\.\.-45"),
        (IMAGES.astype(float), r"images are float64; .*lie in \[0, 255\]: divide"),
        (IMAGES * np.nan, "images are float64; .*NaN or infinite"),
        (IMAGES.astype(str), r"images are <U3; .* Convert them to pixels$"),
        (IMAGES[0], r"\(5, 6, 3\); .*images\[None\]"),
        (IMAGES[..., 0], r"\(9, 5, 6\); .*images\[\.\.\., None\]"),
        (IMAGES.reshape(9, -1), r"\(9, 90\); .*reshape\(-1, H, W, C\)"),
    ],
)
def test_images_without_a_safe_conversion(images, message):
    with pytest.raises(ValueError, match=message) as error:
        data.check(GOOD._replace(images=images))
    assert "astype" not in str(error.value)


@pytest.mark.parametrize(
    "column",
    [NUMBERS, NUMBERS.astype(np.uint8), NUMBERS.astype(float), np.eye(3, dtype=np.int32)[NUMBERS]],
)
def test_labels_of_another_type_have_advice(column):
    followed = advised(GOOD._replace(labels=column), "Use ", 3)
    np.testing.assert_array_equal(followed, NUMBERS)
    data.check(GOOD._replace(labels=followed), 3)


def test_column_labels_are_not_argmaxed():
    followed = advised(GOOD._replace(labels=NUMBERS[:, None]), "Use ")
    np.testing.assert_array_equal(followed, NUMBERS)


@pytest.mark.parametrize(
    ("column", "message"),
    [(NAMES, "strings such as cat"), (NUMBERS + 0.2, "not whole"), (NUMBERS + 2**32, "429496729")],
)
def test_labels_without_a_safe_conversion(column, message):
    with pytest.raises(ValueError, match=message) as error:
        data.check(GOOD._replace(labels=column), 3)
    assert "astype" not in str(error.value) and "argmax" not in str(error.value)


# ---- as_dataset ----


POISONED = attacks.PoisonedDataset(IMAGES, GOOD.labels, np.zeros(9, np.int8), {"attacks": []})


@pytest.mark.parametrize(
    "value",
    [
        GOOD,
        (IMAGES, NUMBERS),
        [IMAGES, NUMBERS.tolist()],
        (list(IMAGES), NAMES[:0].tolist() + NUMBERS.tolist()),
        data.Dataset([image for image in IMAGES], NUMBERS),
        data.Dataset(np.array([*IMAGES, None], object)[:-1], np.eye(3)[NUMBERS]),
        jax.tree.map(jnp.asarray, GOOD),
        POISONED,
        SimpleNamespace(images=IMAGES, labels=NUMBERS),
        (IMAGES, pd.Series(NUMBERS)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_as_dataset_takes_what_a_user_holds(value):
    got = data.as_dataset(value)
    assert type(got) is data.Dataset
    data.check(got, 3)
    np.testing.assert_array_equal(got.images, IMAGES)
    np.testing.assert_array_equal(got.labels, NUMBERS)


def test_as_dataset_copies_nothing_that_is_right():
    got = data.as_dataset(GOOD)
    assert got.images is GOOD.images and got.labels is GOOD.labels
    on_device = jax.tree.map(jnp.asarray, GOOD)
    got = data.as_dataset(on_device)
    assert got.images is on_device.images and got.labels is on_device.labels


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_as_dataset_converts_floats_in_the_unit_interval(dtype):
    images = (IMAGES / 255).astype(dtype)
    got = data.as_dataset((images, NUMBERS)).images
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, images.astype(np.float32))
    # The range is looked at before the cast, which would make 1 of this.
    images = np.full((9, 2, 2, 1), 1 + 1e-12)
    with pytest.raises(ValueError, match=r"float pixels lie in"):
        data.as_dataset((images, NUMBERS))
    with pytest.raises(ValueError, match=r"float pixels lie in \[1e\+300, 1e\+300\]"):
        data.as_dataset((np.full((9, 2, 2, 1), 1e300), NUMBERS))


def test_as_dataset_leaves_to_check_what_it_cannot_know():
    got = data.as_dataset((IMAGES.astype(np.int64), NUMBERS))
    with pytest.raises(ValueError, match=r"They lie in 0\.\.255"):
        data.check(got)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (IMAGES, TypeError, "trusted set is a ndarray; labels are missing"),
        (jnp.asarray(IMAGES), TypeError, "labels are missing"),
        ((IMAGES,), TypeError, "is a tuple; give data.Dataset"),
        ({"images": IMAGES, "labels": NUMBERS}, TypeError, "is a dict; give data.Dataset"),
        (None, TypeError, "is a NoneType"),
        (pd.DataFrame({"a": [1]}), TypeError, "is a DataFrame"),
        (data.load_embedded, TypeError, "is a function"),
        (data.Splits(GOOD, GOOD, GOOD, 3, (), "", ""), TypeError, r"a Splits; .* splits\.train"),
        (([np.zeros((4, 4, 3)), np.zeros((5, 4, 3))], [0, 1]), ValueError, "image 1 is .*5, 4, 3"),
        (([IMAGES[0], IMAGES[0] / 255], [0, 1]), ValueError, "image 1 is float64"),
        ((["a.png", "b.png"], [0, 1]), TypeError, "images are of type str"),
        (([], []), ValueError, "is empty"),
        ((np.ma.array(IMAGES, mask=IMAGES > 9), NUMBERS), ValueError, "images are masked"),
        ((IMAGES, np.ma.array(NUMBERS, mask=NUMBERS > 1)), ValueError, "3 labels are masked"),
        ((IMAGES, NAMES), ValueError, "trusted set: strings such as cat"),
        ((IMAGES, None), TypeError, "trusted set: got a single NoneType"),
    ],
)
def test_as_dataset_refuses_in_plain_words(value, error, message):
    with pytest.raises(error, match=message) as raised:
        data.as_dataset(value, "trusted set")
    assert str(raised.value).startswith("trusted set") and len(str(raised.value)) < 250


def test_check_refuses_what_is_no_data_set():
    for value in ((IMAGES, GOOD.labels), IMAGES, None):
        with pytest.raises(TypeError, match=r"training set is a .*; (give|labels are missing)"):
            data.check(value)
    with pytest.raises(TypeError, match=r"labels are a list; .*data\.as_dataset"):
        data.check(GOOD._replace(labels=NUMBERS.tolist()))
    with pytest.raises(ValueError, match=r"image 0 is uint8 \(5, 6, 3\), image 2 is uint8 \(4, 6"):
        mixed = np.array([*IMAGES[:2], IMAGES[2, 1:], None], object)[:-1]
        data.check(data.Dataset(mixed, NUMBERS[:3].astype(np.int32)))


def test_check_looks_at_ids():
    data.check(GOOD._replace(ids=np.arange(9)))
    with pytest.raises(ValueError, match=r"ids have shape \(8,\); expected an array \(9,\)"):
        data.check(GOOD._replace(ids=np.arange(8)))
    kept = data.as_dataset(GOOD._replace(labels=NUMBERS, ids=np.arange(9)))
    np.testing.assert_array_equal(kept.ids, np.arange(9))


def test_check_alike():
    data.check_alike(GOOD, GOOD)
    data.check_alike(GOOD._replace(labels=GOOD.labels * 0), GOOD)
    with pytest.raises(ValueError, match=r"trusted images are \(4, 6, 3\), training images \(5, 6"):
        data.check_alike(GOOD._replace(images=IMAGES[:, 1:]), GOOD)
    with pytest.raises(
        ValueError, match=r"trusted set: 3 .* label 3 of example 2; expected 0 to 2"
    ):
        data.check_alike(GOOD._replace(labels=GOOD.labels + 1), GOOD)


# ---- pixels ----


def test_conversions_between_the_kinds_of_pixels():
    values = np.arange(256, dtype=np.uint8)[:, None]
    unit = pixels.to_unit(values)
    assert unit.dtype == np.float32 and unit.max() == 1
    np.testing.assert_array_equal(unit, values / np.float32(255))
    np.testing.assert_array_equal(pixels.to_uint8(unit), values)
    assert pixels.to_uint8(values) is values and pixels.to_unit(unit) is unit


@pytest.mark.parametrize("bad", [1.01, -0.01, 2.0, np.nan, np.inf])
def test_no_pixel_wraps_around(bad):
    images = np.full((3, 2, 2, 1), 0.5, np.float32)
    images[1, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"float pixels lie in|NaN or infinite .* image 1"):
        pixels.to_uint8(images)
    if not np.isfinite(bad):
        with pytest.raises(ValueError, match="the first is image 1"):
            pixels.quantize(images, np.full_like(images, 0.5), 0.1)


def test_pixels_of_other_types_are_refused():
    for convert in (pixels.to_uint8, pixels.to_unit):
        for dtype in (np.int64, np.uint16, np.float64, bool):
            with pytest.raises(ValueError, match="expected uint8 or float32"):
                convert(np.ones((2, 2), dtype))


def test_a_budget_without_an_8_bit_pixel_is_refused():
    with pytest.raises(ValueError, match=r"epsilon 0\.001 leaves some pixels no 8-bit value"):
        pixels.quantize(np.full((1, 1), 0.5), np.full((1, 1), 0.5), 0.001)
