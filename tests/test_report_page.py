"""The page of a report in a real browser: no errors, no requests, and a review by keyboard."""

import json
import time

import audited
import chromium
import pytest

from jaxpoison.audit import decisions, findings

pytestmark = pytest.mark.skipif(
    chromium.PROGRAM is None, reason="no chromium found: apt-get install chromium"
)

SHOWN = "[...document.querySelectorAll('.finding')].filter((one) => !one.hidden)"
CURRENT = f"{SHOWN}.indexOf(document.activeElement)"
# Contrast by WCAG 2.1 of all text with the first background behind it that is not transparent.
CONTRASTS = """
(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3)
    .map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if ((channels(color)[3] ?? 1) > 0) return color;
    }
    throw new Error("no background");
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement;
    if (!node.textContent.trim() || element.closest("script, [hidden]")) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${element.className} ${node.textContent.trim()}`);
  }
  return low;
})()
"""  # noqa: E501
# What a person who does not see the page would miss.
UNNAMED = """
[...document.querySelectorAll("img:not([alt]), button, select, input, svg, a")]
  .filter((one) => !one.closest("[hidden]")).filter((one) =>
    one.matches("img") ? true
    : one.matches("svg") ? one.getAttribute("aria-hidden") !== "true"
    : one.matches("select, input") ? !one.labels.length
    : !one.textContent.trim())
  .map((one) => one.outerHTML.slice(0, 100))
"""


@pytest.fixture(scope="module")
def report():
    return audited.sample(60, hostile=True)


@pytest.fixture(scope="module")
def path(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    findings.write(report, folder, ids=())
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, path):
    page = browser.open(path)
    yield page
    page.evaluate("localStorage.clear()")
    assert page.errors == [] and page.requests == []
    page.close()


def ids(page):
    """Returns the ids of the findings that are shown, in order."""
    return page.evaluate(f"{SHOWN}.map((one) => JSON.parse(one.dataset.id))")


def saved(browser, page, folder):
    """Returns the file that the page's button saves."""
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    page.evaluate("document.getElementById('save').click()")
    file, end = folder / "decisions.json", time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        page.evaluate("0")
        time.sleep(0.05)
    return file


def test_it_shows_the_findings(page, report):
    assert ids(page) == [finding.id for finding in report.findings[:50]]
    page.evaluate("document.getElementById('more').click()")
    assert ids(page) == [finding.id for finding in report.findings]
    assert page.evaluate("document.title") == "Review: audit of photos/<b>'24</b>"
    assert page.evaluate("document.querySelectorAll('b b, i').length") == 0
    broken = "[...document.images].filter((one) => one.complete && !one.naturalWidth).length"
    assert page.evaluate(broken) == 0


def test_it_sorts(page, report):
    page.choose("sort", "confidence")
    assert ids(page) == [finding.id for finding in report.findings[:50]]
    page.choose("sort", "severity")
    high = [finding.id for finding in report.findings if finding.severity == "high"]
    assert ids(page)[: len(high)] == high
    page.choose("sort", "class")
    by_class = sorted(report.findings, key=lambda finding: finding.class_name)
    assert ids(page) == [finding.id for finding in by_class][:50]
    page.choose("sort", "name")
    assert ids(page)[0] == "=cmd|' /C calc'!A0"


def test_it_filters(page, report):
    page.choose("kind", "poison")
    assert ids(page) == [finding.id for finding in report.findings if finding.kind == "poison"]
    page.choose("kind", "")
    page.choose("class", json.dumps("cat"))
    assert ids(page) == [finding.id for finding in report.findings if finding.class_name == "cat"]
    page.choose("class", "")
    page.choose("check", json.dumps("margins"))
    assert ids(page) == [finding.id for finding in report.findings if "margins" in finding.checks]
    page.choose("check", "")
    page.choose("text", " <SCRIPT>alert")
    assert ids(page) == [audited.HOSTILE[0]]
    assert page.evaluate("document.getElementById('status').textContent") == "1 of 60 findings"
    page.evaluate("document.getElementById('all').click()")
    assert len(ids(page)) == 50
    page.evaluate("document.querySelector('[data-show-kind=copy]').click()")
    assert ids(page) == [finding.id for finding in report.findings if finding.kind == "copy"]


def test_a_review_by_keyboard_is_saved_and_read(browser, page, report, tmp_path):
    names = [finding.id for finding in report.findings]
    page.press("j", "c", "o")  # each decision goes on to the next finding
    assert page.evaluate(CURRENT) == 2
    page.press("u", "ArrowDown", "ArrowDown", "f", "k", "k", "o", "k", "u", "j")
    assert page.evaluate(CURRENT) == 4
    assert page.evaluate("document.getElementById('progress').textContent") == (
        "3 of 60 decided: 1 confirmed, 1 overruled, 1 fine"
    )
    file = saved(browser, page, tmp_path)
    made = decisions.read(file)
    expected = {names[0]: "confirmed", names[1]: "overruled", names[4]: "fine"}
    assert made == decisions.Decisions(
        fingerprint=report.data.fingerprint, decisions=expected  # the third, decided before, undone
    )  # fmt: skip
    merged = decisions.merge(report, made)
    assert [f.decision for f in merged.findings[:5]] == [
        "confirmed", "overruled", "confirmed", None, "fine"
    ]  # fmt: skip
    # The browser keeps them.
    page.load(page.url)
    state = "document.querySelector('#finding-4').dataset.decision"
    assert page.evaluate(state) == "fine"
    page.choose("decided", "done")
    assert ids(page) == [names[0], names[1], names[4]]


def test_every_hostile_name_survives_the_page(browser, page, report, tmp_path):
    for place in range(len(audited.HOSTILE)):
        page.evaluate(f"document.querySelectorAll('#finding-{place} button')[1].click()")
    made = decisions.read(saved(browser, page, tmp_path))
    assert made.decisions == dict.fromkeys(audited.HOSTILE, "overruled")


def test_keys_in_fields_and_with_control_do_nothing(page):
    page.evaluate("document.querySelector('[name=text]').focus()")
    page.press("c", "j")
    assert page.evaluate("document.querySelector('[name=text]').value") == "cj"
    progress = page.evaluate("document.getElementById('progress').textContent")
    assert progress.startswith("1 of 60 decided")


def test_a_link_shows_a_finding_that_is_filtered_away(page):
    page.choose("kind", "copy")
    page.evaluate("location.hash = 'finding-55'")
    page.until("document.activeElement.id === 'finding-55'")
    assert not page.evaluate("document.activeElement.hidden")


def test_without_javascript_it_is_a_plain_page(browser, path, report):
    page = browser.open(path, script=False)
    # What the inspector evaluates still runs.
    assert ids(page) == [finding.id for finding in report.findings]
    controls = "[...document.querySelectorAll('button, select, input')]"
    assert page.evaluate(f"{controls}.every((one) => one.closest('[hidden]'))")
    assert page.evaluate("document.querySelector('#finding-2 .decision').innerText") == "confirmed"
    assert page.errors == [] and page.requests == []
    page.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_everyone_can_read_it(browser, path, width, dark):
    page = browser.open(path, width=width, height=800, dark=dark)
    page.press("j", "o", "f", "j", "c")
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.evaluate(CONTRASTS) == []
    assert page.evaluate(UNNAMED) == []
    # Tables scroll in their own boxes, the page never does sideways.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("localStorage.clear()")
    assert page.errors == [] and page.requests == []
    page.close()


def test_no_injected_script_or_request_would_run(browser, path, tmp_path):
    """The policy itself, should escaping ever fail."""
    attacked = tmp_path / "report.html"
    attack = "<script>document.title = 'broken'</script><img src='https://example.org/x.png'>"
    attack += "<img src=x onerror=\"document.title = 'broken'\">"
    attacked.write_text(path.read_text().replace("<main>", "<main>" + attack))
    page = browser.open(attacked)
    assert page.evaluate("document.title") == "Review: audit of photos/<b>'24</b>"
    blocked = [str(error) for error in page.errors]
    assert sum("Content Security Policy" in error for error in blocked) >= 3
    page.close()
