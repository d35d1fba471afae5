"""The report in a real browser: no error, sorting, filtering, the slider, configurations, colours.

Screenshots at two widths are left in ``build/report-screenshots``.
"""

import base64
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from report_results import HOSTILE_LABEL, ITERATIONS, PROMPTS, make_results

from g2rpo.files import atomic_write_bytes
from reproduce.experiment import ROOT, load_profile
from reproduce.experiment.layout import Layout
from reproduce.report.chapter import load_chapter
from reproduce.report.documents import find_documents
from reproduce.report.page import make_page

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

pytestmark = pytest.mark.browser

SCREENSHOTS = ROOT / "build" / "report-screenshots"
DESKTOP, PHONE = (1280, 900), (375, 800)
TALLEST = 9000
"""Pixels of a screenshot."""


@pytest.fixture(scope="session")
def made_up(tmp_path_factory: pytest.TempPathFactory, smoke_assets: Path) -> Path:
    folder = tmp_path_factory.mktemp("page")
    results = make_results(folder, smoke_assets)
    path = folder / "report.html"
    path.write_text(make_page(results.loaded, [results.chapter()]).html, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = Layout(ROOT / "runs-that-are-not-there", ROOT / "results")
    profile = load_profile("mini")
    names = sorted(path.parent.name for path in layout.tables.glob("mini/*/cells"))
    chapters = [load_chapter(name, profile, layout) for name in names]
    documents = find_documents(layout.tables / "mini", names)
    path = tmp_path_factory.mktemp("committed") / "report.html"
    path.write_text(make_page(profile, chapters, documents=documents).html, encoding="utf-8")
    return path


def resize(browser: "Chrome", size: tuple[int, int]) -> None:
    width, height = size
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )


def prefer(browser: "Chrome", scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


@pytest.fixture
def opened(browser: "Chrome", made_up: Path) -> "Chrome":
    """The made-up report, fresh, at a desktop's width, in light colours."""
    return open_page(browser, made_up)


def open_page(browser: "Chrome", path: Path) -> "Chrome":
    resize(browser, DESKTOP)
    prefer(browser, "light")
    browser.get_log("browser")
    browser.get(path.as_uri())
    browser.execute_script("localStorage.clear(); location.reload();")
    browser.get(path.as_uri())
    return browser


def errors(browser: "Chrome") -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def one(browser: "Chrome", selector: str) -> "WebElement":
    return browser.find_element("css selector", selector)


def every(browser: "Chrome", selector: str) -> "list[WebElement]":
    return browser.find_elements("css selector", selector)


def texts(browser: "Chrome", selector: str) -> list[str]:
    return [element.text for element in every(browser, selector)]


def choose(browser: "Chrome", selector: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(one(browser, selector)).select_by_visible_text(value)


def keep_screenshot(browser: "Chrome", name: str) -> None:
    height = browser.execute_script("return document.documentElement.scrollHeight")
    width = browser.execute_script("return innerWidth")
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, TALLEST), "scale": 1}
    shot = browser.execute_cdp_cmd(
        "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
    )
    atomic_write_bytes(SCREENSHOTS / f"{name}.png", base64.b64decode(shot["data"]))


def test_it_loads_without_errors_and_no_text_breaks_out(opened: "Chrome") -> None:
    assert errors(opened) == []
    assert opened.execute_script("return window.hacked") is None
    assert texts(opened, ".prompt h4") == list(PROMPTS)
    assert opened.execute_script(
        "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))"
        ".length"
    ) == 0  # fmt: skip
    labels = texts(opened, f"{SCORES} tbody th")
    assert labels == ["Base", "DanceGRPO", "MixGRPO", HOSTILE_LABEL, "G²RPO"]
    assert "missing: train has not run" in one(opened, SCORES).text


SCORES = "#table-made-up-scores"


def test_a_head_sorts_by_click_and_by_key_and_missing_rows_come_last(opened: "Chrome") -> None:
    from selenium.webdriver.common.keys import Keys

    def rows() -> list[str]:
        return texts(opened, f"{SCORES} tbody th")

    original = rows()
    head = one(opened, f"{SCORES} thead th:nth-child(3)")
    button = head.find_element("css selector", "button")
    presses = (button.click, lambda: button.send_keys(Keys.ENTER))
    for order, press in zip(("descending", "ascending"), presses, strict=True):
        press()
        assert head.get_attribute("aria-sort") == order
        cells = every(opened, f"{SCORES} tbody td:nth-child(3)")[:4]
        values = [float(cell.get_attribute("data-sort") or "nan") for cell in cells]
        assert values == sorted(values, reverse=order == "descending")
        assert rows()[-1] == "MixGRPO"
    button.send_keys(Keys.SPACE)
    assert head.get_attribute("aria-sort") == "none"
    assert rows() == original
    one(opened, f"{SCORES} thead th:first-child button").click()
    assert rows() == ["Base", "DanceGRPO", HOSTILE_LABEL, "G²RPO", "MixGRPO"]


def shown_images(browser: "Chrome") -> list[str]:
    found: list[str] = browser.execute_script(
        "return [...document.querySelectorAll('.tile img')].map(i => i.src)"
    )
    return found


def test_prompts_are_filtered(opened: "Chrome") -> None:
    search = one(opened, ".filter input")
    search.send_keys("GREEN c")
    assert texts(opened, ".prompt h4") == ["a green cone"]
    assert "1 of 6 prompts" in one(opened, ".pictures .count").text
    search.send_keys(" that is nowhere")
    assert every(opened, ".prompt") == []
    search.clear()
    search.send_keys("</script>")
    assert texts(opened, ".prompt h4") == [PROMPTS[0]]


def test_the_slider_goes_from_the_base_to_the_end(opened: "Chrome") -> None:
    from selenium.webdriver.common.keys import Keys

    assert one(opened, ".moment b").text == f"after {ITERATIONS} iterations"
    end = shown_images(opened)
    assert len(end) == 4 * len(PROMPTS)
    assert opened.execute_script(
        "return [...document.querySelectorAll('.tile img')].every(i => i.naturalWidth === 32)"
    )
    one(opened, ".moment input").send_keys(Keys.ARROW_LEFT)
    assert one(opened, ".moment b").text == "after 4 iterations"
    before = shown_images(opened)
    # Four prompts have images of this moment, of every row; the base's own stays.
    assert len(before) == 4 * 4
    assert before[0] == end[0]
    assert all(one != other for one, other in zip(before[1:4], end[1:4], strict=True))
    assert texts(opened, ".prompt h4") == list(PROMPTS[:4])
    assert "; 2 more without an image at this iteration" in one(opened, ".pictures .count").text
    one(opened, ".moment input").send_keys(Keys.HOME)
    assert one(opened, ".moment b").text == "before the first iteration"
    start = shown_images(opened)
    assert len(set(start)) == len(PROMPTS)
    assert start[:4] == [end[0]] * 4
    assert errors(opened) == []


def test_scores_stand_with_the_images(opened: "Chrome") -> None:
    base, dance, *_ = texts(opened, ".prompt:first-child .what")
    assert float(base) == pytest.approx(0.7, abs=0.1)
    assert "†" in dance and "(" in dance
    choose(opened, ".score select", "CLIP")
    other = texts(opened, ".prompt:first-child .what")
    assert float(other[0]) == pytest.approx(0.6, abs=0.1)
    assert "†" not in other[1]
    choose(opened, ".seed select", "3")
    labels = texts(opened, ".prompt:first-child .who")
    assert labels == ["Base", "DanceGRPO", "G²RPO"]


def test_an_image_is_enlarged_and_left_by_key(opened: "Chrome") -> None:
    from selenium.webdriver.common.keys import Keys

    one(opened, ".prompt:first-child .tile button").click()
    dialog = one(opened, "#enlarged")
    assert dialog.is_displayed()
    assert PROMPTS[0] in dialog.text
    assert "Base" in dialog.text
    dialog.find_element("css selector", ".row button").send_keys(Keys.ARROW_RIGHT)
    assert "DanceGRPO" in dialog.text
    opened.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()


def test_curves_change_with_quantity_axis_and_legend(opened: "Chrome") -> None:
    from selenium.webdriver.common.keys import Keys

    assert len(every(opened, ".panel path.line")) == 3
    # Two of the three rows have three seeds, and so a band.
    assert len(every(opened, ".panel path.band")) == 2
    before = [p.get_attribute("d") for p in every(opened, ".panel path.line")]
    choose(opened, ".axis-choice select", "Velocity evaluations in rollouts")
    assert texts(opened, ".panel svg > text")[-1] == "Velocity evaluations in rollouts"
    choose(opened, ".metric select", "HPS of the training samples (running mean)")
    assert [p.get_attribute("d") for p in every(opened, ".panel path.line")] != before
    first = one(opened, ".legend button")
    first.click()
    assert first.get_attribute("aria-pressed") == "false"
    assert len(every(opened, ".panel path.line")) == 2
    panel = one(opened, ".panel svg")
    panel.send_keys(Keys.END)
    assert "G²RPO" in one(opened, ".readout").text
    assert "at 6k" in one(opened, ".readout").text
    panel.send_keys(Keys.ESCAPE)
    assert one(opened, ".readout").text == ""
    assert errors(opened) == []


def test_any_two_configurations_are_compared(opened: "Chrome") -> None:
    choose(opened, ".first select", "G²RPO (HPS), seed 1")
    choose(opened, ".second select", "G²RPO (HPS), seed 3")
    assert texts(opened, ".difference tbody th") == ["train.seed"]
    assert texts(opened, ".difference tbody td") == ["1", "3"]
    choose(opened, ".second select", "DanceGRPO (HPS), seed 1")
    found = texts(opened, ".difference tbody th")
    assert "train.method.name" in found
    assert "train.seed" not in found
    one(opened, "#difference .check input").click()
    assert "train.seed" in texts(opened, ".difference tbody th")


def part(browser: "Chrome") -> str:
    script = "const s = document.getElementById('goto'); return s.options[s.selectedIndex].text"
    return str(browser.execute_script(script))


def test_every_part_is_reached_by_name_and_by_steps(browser: "Chrome", committed: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    open_page(browser, committed)
    top = "return Math.abs(document.getElementById(arguments[0]).getBoundingClientRect().top)"

    def arrived(identity: str) -> None:
        WebDriverWait(browser, 60).until(lambda b: b.execute_script(top, identity) < 120)

    assert part(browser) == "Overview"
    assert not one(browser, "#previous").is_enabled()
    choose(browser, "#goto", "table2: Learning curves")
    arrived("curves-table2")
    one(browser, "#previous").click()
    arrived("chapter-table1")
    assert part(browser) == "table1"
    one(browser, "#next").click()
    arrived("chapter-table2")
    # Where one scrolls oneself, the part that is read is told.
    browser.execute_script(
        "setTimeout(() => document.getElementById('cost-table1').scrollIntoView(), 900)"
    )
    WebDriverWait(browser, 60).until(lambda b: part(b) == "table1: Cost")
    options = browser.execute_script(
        "return [...document.getElementById('goto').options].map(o => o.value)"
    )
    assert browser.execute_script(
        "return arguments[0].every(id => document.getElementById(id) !== null)", options
    )
    browser.execute_script("scrollTo(0, 0)")
    one(browser, "#table-overview a[href='#chapter-table2']").click()
    arrived("chapter-table2")
    assert errors(browser) == []


def test_a_row_leads_to_its_run_also_where_a_search_hides_it(opened: "Chrome") -> None:
    def shown() -> int:
        return len(every(opened, "#table-provenance tbody tr:not([hidden])"))

    whole = shown()
    one(opened, "#provenance .controls input").send_keys("g2rpo seed2")
    assert shown() == 1
    assert f"1 of {whole} runs" in one(opened, "#provenance .count").text
    opened.execute_script("scrollTo({ top: 0, behavior: 'instant' })")
    one(opened, f"{SCORES} tbody tr:nth-child(2) a").click()
    target = one(opened, "tr:target")
    assert target.get_attribute("id") == "run-made-up-hps-dance-grpo"
    assert "dance_grpo-hps-seed1-" in target.text
    assert target.is_displayed()
    assert shown() == whole


def background(browser: "Chrome") -> str:
    script = "return getComputedStyle(document.body).backgroundColor"
    return str(browser.execute_script(script))


def test_colours_follow_the_system_and_the_button(opened: "Chrome") -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    light = background(opened)
    prefer(opened, "dark")
    dark = background(opened)
    assert dark != light
    button = one(opened, "#theme")
    button.click()
    assert (button.text, background(opened)) == ("Light", light)
    prefer(opened, "light")
    button.click()
    assert (button.text, background(opened)) == ("Dark", dark)

    def is_kept(browser: "Chrome") -> bool:
        browser.refresh()
        return one(browser, "#theme").text == "Dark"

    # Chromium stores the choice asynchronously.
    WebDriverWait(opened, 60).until(is_kept)
    assert background(opened) == dark
    one(opened, "#theme").click()
    assert background(opened) == light


CONTRAST = """
function channels(text) {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function luminance(text) {
  const [r, g, b] = channels(text).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function ground(node) {
  for (; node; node = node.parentElement) {
    const found = getComputedStyle(node).backgroundColor;
    if (found !== "rgba(0, 0, 0, 0)") return found;
  }
}
const worst = [];
for (const node of document.querySelectorAll("main *, header *")) {
  if (![...node.childNodes].some(c => c.nodeType === 3 && c.textContent.trim())) continue;
  if (!node.checkVisibility() || node.closest("svg, option, .unseen, .arrow")) continue;
  const [one, two] = [getComputedStyle(node).color, ground(node)].map(luminance);
  const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  if (ratio < 4.5) worst.push([node.tagName, node.className, node.textContent.slice(0, 40), ratio]);
}
return worst;
"""


def test_texts_have_contrast(opened: "Chrome") -> None:
    for scheme in ("light", "dark"):
        prefer(opened, scheme)
        assert opened.execute_script(CONTRAST) == []


WIDER = """
const width = document.documentElement.clientWidth;
return [...document.querySelectorAll("body *")]
  .filter(node => !node.closest(".scroll, nav, .unseen") && !node.matches(".skip")
    && node.checkVisibility()
    && node.getBoundingClientRect().right > width + 1).map(node => node.outerHTML.slice(0, 120));
"""


@pytest.mark.parametrize(
    ("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark"), ((320, 640), "light")]
)
def test_nothing_is_wider_than_the_screen(
    opened: "Chrome", size: tuple[int, int], scheme: str
) -> None:
    resize(opened, size)
    prefer(opened, scheme)
    keep_screenshot(opened, f"made-up-{size[0]}-{scheme}")
    for details in every(opened, "section > details"):
        opened.execute_script("arguments[0].open = true", details)
    assert opened.execute_script("return document.documentElement.scrollWidth") == size[0]
    assert opened.execute_script(WIDER) == []


def test_everything_can_be_reached_and_has_a_name(opened: "Chrome") -> None:
    nameless = opened.execute_script(
        "const all = 'button, select, input, a, [role=region], [role=img]';"
        "return [...document.querySelectorAll(all)]"
        ".filter(n => !(n.getAttribute('aria-label') || n.textContent.trim() || n.labels?.length))"
        ".map(n => n.outerHTML)"
    )
    assert nameless == []
    doubled: Any = opened.execute_script(
        "const ids = [...document.querySelectorAll('[id]')].map(n => n.id);"
        "return ids.filter((id, i) => ids.indexOf(id) !== i)"
    )
    assert doubled == []
    headings = opened.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3,h4')].map(n => Number(n.tagName[1]))"
    )
    assert headings[0] == 1
    assert all(two - one <= 1 for one, two in pairwise(headings))


def test_the_committed_results_load_at_both_widths(browser: "Chrome", committed: Path) -> None:
    open_page(browser, committed)
    assert errors(browser) == []
    rows = every(browser, "#table-overview tbody tr")
    # Beside the experiments: what stands in words, the configurations and the provenance.
    assert len(every(browser, ".chapter")) == len(rows) + len(every(browser, ".document")) + 2
    assert len(rows) == len(list((ROOT / "results" / "mini").glob("*/cells"))) > 1
    assert len(every(browser, "#table-table1-scores tbody tr")) == 11
    # Without run folders the picture that stands with the table is shown.
    widths = "return [...document.querySelectorAll(arguments[0])].map(i => i.naturalWidth)"
    sheets = browser.execute_script(widths, ".chapter:not(.document) .sheet img")
    published = (ROOT / "results" / "mini").glob("*/*.png")
    assert len(sheets) == sum(path.name in ("pictures.png", "frontier.png") for path in published)
    assert min(sheets) > 200
    assert "81 of 81 runs" in one(browser, "#chapter-table1 .facts").text
    assert len(every(browser, "#chapter-table1 .panel")) == 2
    for name, size, scheme in (("desktop", DESKTOP, "light"), ("phone", PHONE, "dark")):
        resize(browser, size)
        prefer(browser, scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") == size[0]
        keep_screenshot(browser, f"mini-{name}-{scheme}")
    assert errors(browser) == []
