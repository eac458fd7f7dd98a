"""The Python examples of the guides and of the walk-through run as they are printed."""

import doctest
import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NUMBER = re.compile(r"\d+(?:\.\d+)?")
MOST_POINTS = 6


EXECUTE = runpy.run_path(str(DOCS / "execute.py"))


@pytest.mark.parametrize("guide", ["influence.md", "filters.md"])
def test_guides_print_what_they_say(guide):
    path = DOCS / guide
    result = doctest.testfile(str(path), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 20 and result.failed == 0


@pytest.mark.parametrize("page", ["hint.md", "walk-through.md"])
def test_pages_print_what_they_say(page, tmp_path):
    results = EXECUTE["execute"](DOCS / page, tmp_path)
    assert len(results) > 5
    for expected, printed in results:
        assert_alike(printed, expected or "")
    text = (DOCS / page).read_text(encoding="utf-8")
    for picture in EXECUTE["PICTURE"].findall(text):
        assert (tmp_path / picture).exists() and (DOCS / picture).exists()


def assert_alike(printed, expected):
    """Words must be the same; trainings differ between processors, so numbers by some points."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", expected)
    for one, other in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True):
        assert abs(float(one) - float(other)) <= MOST_POINTS, (printed, expected)


def test_numbers_of_pages_are_compared():
    with pytest.raises(AssertionError):
        assert_alike("found 80% of 3", "found 50% of 3")
    with pytest.raises(AssertionError):
        assert_alike("found 80%", "lost 80%")
    assert_alike("accuracy 80.5%", "accuracy 81.0%")
