"""Adds the navigation to the front page.

Listed pages keep their order; missing ones are skipped. Unlisted pages of docs/ get a section at
the end, and committed results are listed below results/mini/README.
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
    names = app.project.docnames
    taken, text = {front}, ""
    for caption, entries in listed.items():
        shown = []
        for entry in entries:
            page, line = _resolved(entry, folder)
            taken.add(page)
            if page in names:
                shown.append(line)
        text += _toctree(caption, shown) if shown else ""
    more = sorted(d for d in names if PurePosixPath(d).parent == folder and d not in taken)
    return text + (_toctree("More", [f"/{page}" for page in more]) if more else "")


def _resolved(entry: str, folder: PurePosixPath) -> tuple[str, str]:
    """The page that ``page`` or ``title <page>`` names from ``folder``, and its toctree line."""
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
    """Registers ``contents_sections``: captions and their pages."""
    app.add_config_value("contents_sections", {}, "env")
    app.connect("source-read", _add_contents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
