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

from benchmarks.evaluation.statistics import human
from g2rpo.errors import UserError
from g2rpo.text import plain_value, visible
from reproduce.experiment import Profile
from reproduce.report.chapter import Chapter
from reproduce.report.configurations import configuration_data
from reproduce.report.curves import curve_data
from reproduce.report.documents import Document
from reproduce.report.grids import anchor
from reproduce.report.images import Fitted, Fitter
from reproduce.report.overview import overview_grid, provenance_grid
from reproduce.report.pictures import gather_pictures, picture_data
from reproduce.report.table_grids import (
    COST_PARTS,
    block_grid,
    comparison_grid,
    cost_grid,
    phase_grid,
)
from reproduce.tables.blocks import blocks
from reproduce.tables.model import Table
from reproduce.tables.summary import pair_sentence, pairs

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
    """A rendered report, and what was omitted to limit its size."""

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


def view_of(chapter: Chapter) -> dict[str, Any]:
    """A chapter as the template shows it, without its images; a grid is None if it would be empty.

    Raises:
        UserError: the cells do not match the table or each other.
    """
    name, table, styles = chapter.name, chapter.table, chapter.table.styles
    notes = (*table.legend, *_mark_notes(table), *table.notes)
    more = {"": notes, "-beside": table.metric_legend}
    shown = {
        block.suffix: block_grid(name, table, block, more.get(block.suffix, ()))
        for block in blocks(table)
        if block.suffix != "-cost"
    }
    return {
        "chapter": chapter,
        "facts": _facts(chapter),
        "missing": _missing(chapter),
        "sentences": _sentences(table),
        "scores": shown[""],
        "headroom": shown.get("-headroom"),
        "beside": shown.get("-beside"),
        "comparisons": comparison_grid(table),
        "paper": shown.get("-paper"),
        "styles": block_grid(name, styles, blocks(styles)[0], styles.notes) if styles else None,
        "cost": cost_grid(name, table),
        "phases": phase_grid(name, table, chapter.cells),
        "curves": curve_data(chapter),
        "figures": _figures(chapter),
    }


def _figures(chapter: Chapter) -> list[str | None]:
    """The figures that the table declares, where they have been written."""
    folder = chapter.layout.experiment(chapter.profile.name, chapter.name)
    paths = (folder / f"{name}.png" for name in chapter.spec.figures)
    return [_png_uri(path) for path in paths if path.is_file()]


def _sentences(table: Table) -> tuple[str, ...]:
    """One sentence per pair of compared rows."""
    found = []
    for pair in pairs(table.asked("rows", "baseline")):
        group = table.row(pair[0].first).group
        found.append((f"{group}: " if group else "") + pair_sentence(table, pair))
    return tuple(found)


def _mark_notes(table: Table) -> list[str]:
    marks = [score.mark for row in table.rows for score in row.scores.values()]
    references = {table.row(mark.second).full_label for mark in marks if mark is not None}
    if not references:
        return []
    note = (
        f"▲ ▼: significantly above or below {' or '.join(sorted(references))} (p < 0.05 after "
        "Holm's correction over the row's scores); △ ▽: before correction only. The test is at the "
        "level of the row's intervals."
    )
    return [note]


def _facts(chapter: Chapter) -> tuple[tuple[str, str], ...]:
    cells = chapter.cells
    protocols = sorted({cell.info.protocol.title for cell in cells})
    prompts = sorted({cell.scores["prompt_id"].nunique() for cell in cells})
    seeds = ", ".join(map(str, chapter.seeds)) or "none"
    return (
        ("Finished", f"{len(cells)} of {len(cells) + len(chapter.gaps)} runs"),
        ("Training seeds", seeds),
        ("Held-out prompts", " or ".join(map(human, prompts)) or "none"),
        ("Protocol", ", ".join(protocols) or "none"),
    )


def _missing(chapter: Chapter) -> tuple[str, ...]:
    return tuple(
        f"{chapter.labels[gap.row]}{'' if gap.seed is None else f', seed {gap.seed}'}: {gap.reason}"
        for gap in chapter.gaps
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
    """Renders the chapters, then the documents.

    Images are omitted, with a note, until the page has at most ``limit`` bytes.

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
