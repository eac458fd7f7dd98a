"""The documentation builds offline, without a warning, and leaves no public name out."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import chromium
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = sorted(path for path in (DOCS / "api").glob("*.md") if path.stem != "index")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-n", "-W", "--keep-going"]
    result = subprocess.run(
        [*command, str(DOCS), str(folder)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_every_page_is_built(site):
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).exists(), page


def test_no_page_asks_the_network_for_anything(site):
    for page in site.rglob("*.html"):
        tags = r'<(?:script|link|img)[^>]*?(?:src|href)="(\w+:[^"]*)"'
        loaded = re.findall(tags, page.read_text())
        assert not [url for url in loaded if not url.startswith("data:")], page


def test_pages_of_experiments_show_committed_results(site):
    page = (site / "experiments" / "untargeted.html").read_text()
    assert "69.18 ± 4.59" in page and "{committed}" not in page
    assert list((site / "_images").glob("accuracy*.png"))


# Furo hides what is too wide for the page, so its width is that of the screen all the same.
WIDEST = """Math.max(...[...document.querySelectorAll('article *')]
    .filter(element => !element.parentElement.closest('pre, .table-wrapper'))
    .map(element => element.getBoundingClientRect().right))"""


@pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium found: apt-get install chromium")
def test_pages_fit_a_phone_and_log_no_errors(site, tmp_path):
    width, wide = 360, {}
    with chromium.Chromium(tmp_path / "profile") as browser:
        for path in sorted((*site.glob("*.html"), site / "api" / "influence.html")):
            if path.stem == "search":
                continue  # empty until something is searched
            page = browser.open(path, width=width)
            right = page.evaluate(WIDEST)
            if page.errors or right > width:
                wide[path.name] = right, page.errors
            page.close()
        page = browser.open(site / "index.html", width=width)
        page.evaluate("document.querySelector('article').style.minWidth = '500px'")
        assert page.evaluate(WIDEST) > width  # it would be seen
    assert not wide


def public(module):
    """Returns names of the classes and functions that a module is imported for."""
    package = hasattr(module, "__path__")
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith("jaxpoison")
        and (package or value.__module__ == module.__name__)
    }


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_the_reference_lists_every_public_name(page):
    text = page.read_text()
    (name,) = re.findall(r"^\.\. automodule:: (\S+)$", text, re.M)
    listed = set()
    for group in re.findall(r":nosignatures:\n\n((?:   \w+\n)+)", text):
        listed |= set(group.split())
    if name == "jaxpoison.influence":
        listed.remove("Stream")  # of `core.batches`, for users of influence
    assert listed == public(importlib.import_module(name))


def test_every_experiment_has_a_page():
    scripts = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    tools = {"tables", "convert_efficientnet"}
    index = (DOCS / "experiments" / "index.md").read_text()
    assert scripts - tools == set(re.findall(r"\| `(\w+)\.py` \|", index))
    for page, script in re.findall(r"^\| \[.*?\]\(([\w-]+\.md)\) \| `(\w+\.py)` \|", index, re.M):
        text = (DOCS / "experiments" / page).read_text()
        assert f"python experiments/{script}" in text
        for part in ("Question", "Command", "Time", "What differs from the paper"):
            assert f"**{part}" in text, (page, part)


def anchors(path):
    """Returns the fragments of a Markdown file, as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target, _, anchor in re.findall(r"\]\(((?!\w+:)[^)#]*)(#([^)]*))?\)", page.read_text()):
        path = (page.parent / target) if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), (target, anchor)
