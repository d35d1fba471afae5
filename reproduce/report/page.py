"""The report as one self-contained HTML file of bounded size, with everything escaped."""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from g2rpo.errors import UserError
from g2rpo.text import plain_value, visible
from reproduce.experiment import Profile
from reproduce.report.chapter import Chapter
from reproduce.report.configurations import configuration_data
from reproduce.report.documents import Document
from reproduce.report.grids import anchor
from reproduce.report.images import Fitted, Fitter
from reproduce.report.overview import overview_grid, provenance_grid
from reproduce.report.pictures import gather_pictures, picture_data
from reproduce.report.table_grids import COST_PARTS
from reproduce.report.view import view_of

TEMPLATES = Path(__file__).parent / "templates"
LIMIT = 15_000_000
"""Maximum bytes of a page, which mail servers and code hosts accept and phones can open."""
SCRIPTS = (
    "common.js",
    "navigation.js",
    "tables.js",
    "curves.js",
    "pictures.js",
    "configurations.js",
)


@dataclass(frozen=True)
class Page:
    """A rendered report.

    Attributes:
        html: the file's text.
        notes: what was omitted to limit its size.
    """

    html: str
    notes: tuple[str, ...]


def script_json(value: Any) -> Markup:
    """JSON for a script element; no text in it can end the element or start one."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - escaped above


def _visible(value: Any) -> Any:
    """Applies :func:`g2rpo.text.visible` to every string in ``value``."""
    if isinstance(value, dict):
        return {visible(key): _visible(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_visible(inner) for inner in value]
    return visible(value) if isinstance(value, str) else value


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        finalize=plain_value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _rendered(
    profile: Profile, views: Sequence[Mapping[str, Any]], documents: Sequence[Document]
) -> Callable[[Fitted], str]:
    """Returns a function that renders the page with some of its images."""
    chapters = [view["chapter"] for view in views]
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    script = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    configurations = [one for chapter in chapters for one in configuration_data(chapter)]
    template = _environment().get_template("page.html.j2")
    always = {
        "profile": profile,
        "views": views,
        "figures": [_png_uri(document.figure) for document in documents],
        "drawn": [[_png_uri(path) for path in view["figures"]] for view in views],
        "overview": overview_grid(chapters),
        "documents": documents,
        "cost_parts": COST_PARTS,
        "provenance": provenance_grid(chapters),
        # Hashes in the content security policy allow this script and style only.
        "style": Markup(style),  # noqa: S704
        "script": Markup(script),  # noqa: S704
        "style_digest": _digest(style),
        "script_digest": _digest(script),
        "anchor": anchor,
    }

    def render(fitted: Fitted) -> str:
        galleries = fitted.galleries
        pictures = [
            picture_data(view["chapter"], gallery, fitted.names)
            for view, gallery in zip(views, galleries, strict=True)
        ]
        data = {
            "chapters": {
                view["chapter"].name: {"curves": view["curves"], "pictures": shown}
                for view, shown in zip(views, pictures, strict=True)
            },
            "configurations": configurations,
        }
        return template.render(
            always,
            pictures=pictures,
            galleries=galleries,
            sheets=[_png_uri(gallery.sheet) for gallery in galleries],
            picture_notes=fitted.notes,
            data=script_json(_visible(data)),
            images=script_json(fitted.uris),
        )

    return render


def _png_uri(path: Path | None) -> str | None:
    if path is None:
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def make_page(
    profile: Profile,
    chapters: Sequence[Chapter],
    limit: int = LIMIT,
    documents: Sequence[Document] = (),
) -> Page:
    """Renders the report.

    Args:
        profile: the profile of all chapters.
        chapters: the experiments in order.
        limit: maximum bytes of the page; images are omitted, with a note, until it fits.
        documents: Markdown documents, shown after the experiments.

    Raises:
        UserError: there is nothing to show, cells do not match, or the page exceeds ``limit`` even
            without images.
    """
    if not any(chapter.cells for chapter in chapters):
        raise UserError("no finished cells to report")
    render = _rendered(profile, [view_of(chapter) for chapter in chapters], documents)
    fit = Fitter([gather_pictures(chapter) for chapter in chapters])
    empty = render(fit(0))
    # The names and scores of the images take room as well.
    taken = len(empty.encode())
    if taken > limit:
        raise UserError(
            f"the report takes {taken / 1e6:.1f} MB without images, more than the limit of "
            f"{limit / 1e6:.1f} MB; report fewer experiments or raise --limit"
        )
    room = limit - taken
    for _ in range(4):
        fitted = fit(room)
        html = render(fitted)
        excess = len(html.encode()) - limit
        if excess <= 0:
            return Page(html, fitted.notes)
        room -= excess + room // 20
    return Page(empty, fit(0).notes)
