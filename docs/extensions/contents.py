"""The navigation: sections of pages, added to the front page when it is read.

Pages that are named are shown in their order, those that are not there left out. All others are
found: a page of the documentation in a section of its own at the end, one of the committed results
below the page that introduces them.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from sphinx.application import Sphinx

RESULTS = "results/mini/README"
ENTRY = re.compile(r"(?:(?P<title>.+) <)?(?P<page>[^<>]+)>?")


def _toctree(caption: str | None, entries: Iterable[str]) -> str:
    options = [":hidden:", *([f":caption: {caption}"] if caption else []), ":maxdepth: 1"]
    return "\n".join(["", "```{toctree}", *options, "", *entries, "```", ""])


def _sections(app: Sphinx, front: str, listed: Mapping[str, list[str]]) -> str:
    folder = PurePosixPath(front).parent
    found = app.project.docnames
    taken, text = {front}, ""
    for caption, entries in listed.items():
        shown = []
        for entry in entries:
            page, line = _resolved(entry, folder)
            taken.add(page)
            if page in found:
                shown.append(line)
        text += _toctree(caption, shown) if shown else ""
    more = sorted(d for d in found if PurePosixPath(d).parent == folder and d not in taken)
    return text + (_toctree("More", [f"/{page}" for page in more]) if more else "")


def _resolved(entry: str, folder: PurePosixPath) -> tuple[str, str]:
    """``page`` or ``title <page>``, from the front page's folder: the page, and its line."""
    match = ENTRY.fullmatch(entry)
    assert match is not None, entry
    page = match["page"]
    page = page.removeprefix("/") if page.startswith("/") else str(folder / page)
    return page, f"{match['title']} </{page}>" if match["title"] else f"/{page}"


def _add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == app.config.root_doc:
        source[0] += _sections(app, docname, app.config.contents_sections)
    elif docname == RESULTS:
        pages = sorted(d for d in app.project.docnames if d.startswith("results/") and d != RESULTS)
        source[0] += _toctree(None, (f"/{page}" for page in pages))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers ``contents_sections``: captions, and the pages below each."""
    app.add_config_value("contents_sections", {}, "env")
    app.connect("source-read", _add_contents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
