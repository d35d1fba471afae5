"""A sheet for raters in a real browser: pictures, answers, what is kept, and what is saved."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from reproduce.raters.answers import read_answers
from reproduce.raters.pictures import find_sides
from reproduce.raters.sheet import PAGE, make_sheet

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = pytest.mark.browser

PAIRS = 5
WIDTHS = (1280, 375)


def write_pictures(folder: Path, shade: int) -> Path:
    folder.mkdir()
    for index in range(PAIRS):
        pixels = np.full((16, 16, 3), shade + index, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06d}.png")
    return folder


def find(browser: "Chrome", selector: str) -> list:
    return browser.find_elements("css selector", selector)


def downloaded(folder: Path) -> Path:
    until = time.monotonic() + 600
    while time.monotonic() < until:
        # Chromium creates the file empty, writes beside it and renames at the end.
        found = [path for path in folder.glob("*.csv") if path.stat().st_size]
        if found:
            return found[0]
        time.sleep(0.1)
    raise AssertionError("nothing was saved")


def test_answers_are_kept_and_saved_for_the_reader(browser: "Chrome", tmp_path: Path) -> None:
    folders = [write_pictures(tmp_path / name, shade) for name, shade in (("x", 10), ("y", 200))]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a picture of {index}\n" for index in range(PAIRS)))
    sides = find_sides([str(folder) for folder in folders], tmp_path, prompts)
    key = make_sheet(sides, tmp_path / "sheet", pairs=None, seed=3)
    saved = tmp_path / "saved"
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(saved)}
    )
    browser.get_log("browser")  # what other pages left
    browser.get((tmp_path / "sheet" / PAGE).as_uri())
    images = find(browser, "main img")
    assert len(images) == 2 * PAIRS
    shown = "return [...document.images].every(i => i.complete && i.naturalWidth === 16)"
    assert browser.execute_script(shown)
    for width in WIDTHS:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    expected = {}
    for index, section in enumerate(find(browser, "section")[:-1]):
        choice = ("left", "tie", "right")[index % 3]
        radio = section.find_element("css selector", f"input[value={choice}]")
        radio.click()
        expected[radio.get_attribute("name")] = choice
    (rater,) = find(browser, "#rater")
    rater.send_keys('Ann, "B"')
    browser.refresh()
    assert find(browser, "#count")[0].text == f"{PAIRS - 1} of {PAIRS} answered"
    find(browser, "#next")[0].click()
    assert browser.current_url.endswith(f"#pair-{key.pairs[-1].pair}")
    find(browser, "#save")[0].click()
    answers = read_answers([downloaded(saved)], key)
    assert list(answers.values()) == [expected]
    assert [one for one in browser.get_log("browser") if one["level"] == "SEVERE"] == []
