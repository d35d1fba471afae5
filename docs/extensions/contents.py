"""The navigation: sections of pages, added to the front page when it is read.

Pages that are named are shown in their order. All others are found: a page of the documentation in
a section of its own at the end, one of the committed results below the page that introduces them.
"""

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from sphinx.application import Sphinx

RESULTS = "results/mini/README"


def _toctree(caption: str | None, pages: Iterable[str]) -> str:
    options = [":hidden:", *([f":caption: {caption}"] if caption else []), ":maxdepth: 1"]
    return "\n".join(["", "```{toctree}", *options, "", *pages, "```", ""])


def _sections(app: Sphinx, front: str, listed: Mapping[str, list[str]]) -> str:
    folder = PurePosixPath(front).parent
    found = app.project.docnames
    named = {title: [_name(folder, page) for page in pages] for title, pages in listed.items()}
    taken = {front, *(page for pages in named.values() for page in pages)}
    more = sorted(d for d in found if PurePosixPath(d).parent == folder and d not in taken)
    named["More"] = more
    shown = {title: [f"/{p}" for p in pages if p in found] for title, pages in named.items()}
    return "".join(_toctree(title, pages) for title, pages in shown.items() if pages)


def _name(folder: PurePosixPath, page: str) -> str:
    return page.removeprefix("/") if page.startswith("/") else str(folder / page)


def _add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == app.config.root_doc:
        source[0] += _sections(app, docname, app.config.contents_sections)
    elif docname == RESULTS:
        pages = sorted(d for d in app.project.docnames if d.startswith("results/") and d != RESULTS)
        source[0] += _toctree(None, (f"/{page}" for page in pages))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers ``contents_sections``: a title, and its pages from the folder of the front page."""
    app.add_config_value("contents_sections", {}, "env")
    app.connect("source-read", _add_contents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
