"""A headless Chromium, and a page of the report in it."""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_ARGUMENTS = (
    "--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars",
    "--force-prefers-reduced-motion",
    # Chromium's own sandbox does not start as root, where tests in containers run.
    "--no-sandbox",
)  # fmt: skip


def _found(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator["Chrome"]:
    """One browser for all tests; they are skipped where there is none."""
    program = _found("chromium", "chromium-browser", "google-chrome")
    driver = _found("chromedriver", "chromium.chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with chromium-driver here; `make test-browser` installs them")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in _ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.set_page_load_timeout(60)
    try:
        yield opened
    finally:
        opened.quit()
