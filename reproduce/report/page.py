"""The report as one HTML file: nothing is fetched, everything is escaped, the size is bounded."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from benchmarks.evaluation.statistics import human
from g2rpo.errors import UserError
from g2rpo.text import plain_value, visible
from reproduce.experiment import Profile
from reproduce.report import grids
from reproduce.report.chapter import Chapter
from reproduce.report.configurations import configuration_data
from reproduce.report.curves import curve_data
from reproduce.report.documents import Document
from reproduce.report.images import Fitted, fit
from reproduce.report.marks import Mark, reference_of, table_marks
from reproduce.report.overview import overview_grid
from reproduce.report.pictures import Gallery, gather_pictures, picture_data
from reproduce.report.provenance import provenance_grid
from reproduce.tables.findings import findings
from reproduce.tables.notes import full_label
from reproduce.tables.old_formats import legend
from reproduce.tables.old_summary import pair_sentence
from reproduce.tables.paper import load_paper_tables
from reproduce.tables.styles import style_table
from reproduce.tables.values import Table, build_table

TEMPLATES = Path(__file__).parent / "templates"
LIMIT = 15_000_000
"""Bytes that a page may have: what mail servers and code hosts still take and phones still open."""
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
        notes: what was left out for its size.
    """

    html: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """What the template shows of a chapter; its grids and sentences."""

    chapter: Chapter
    table: Table
    marks: dict[tuple[str, str], Mark]
    facts: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    sentences: tuple[str, ...]
    scores: grids.Grid
    beside: grids.Grid | None
    comparisons: grids.Grid | None
    paper: grids.Grid | None
    styles: grids.Grid | None
    cost: grids.Grid
    phases: grids.Grid | None


def view_of(chapter: Chapter) -> View:
    """Computes everything of a chapter that is a table or a sentence.

    Raises:
        UserError: the cells do not fit the table or each other.
    """
    spec, profile, cells = chapter.experiment.table, chapter.profile.name, chapter.cells
    table = build_table(spec, cells, profile=profile, paper=load_paper_tables(), gaps=chapter.gaps)
    marks = table_marks(spec, cells, profile=profile)
    found = findings(spec, cells, profile=profile)
    pairs = dict.fromkeys((f.group, f.focus.key, f.other.key) for f in found)
    sentences = [
        (f"{group}: " if group else "")
        + pair_sentence([f for f in found if (f.group, f.focus.key, f.other.key) == pair])
        for pair in pairs
        for group in pair[:1]
    ]
    styles = style_table(spec, cells, profile=profile)
    beside_notes = [note for note in legend(table) if _is_beside(note)]
    notes = [note for note in legend(table) if not _is_beside(note)]
    return View(
        chapter=chapter,
        table=table,
        marks=marks,
        facts=_facts(chapter),
        missing=_missing(chapter),
        sentences=tuple(sentences),
        scores=grids.score_grid(
            chapter.name,
            table,
            marks,
            (*notes, *_mark_notes(chapter), *table.notes),
        ),
        beside=grids.beside_grid(chapter.name, table, beside_notes),
        comparisons=grids.finding_grid(spec, found),
        paper=grids.paper_grid(table),
        styles=None if styles is None else grids.score_grid(chapter.name, styles, {}, styles.notes),
        cost=grids.cost_grid(chapter.name, table, cells),
        phases=grids.phase_grid(chapter.name, table, cells),
    )


def _is_beside(note: str) -> bool:
    return note.startswith(("Image distance", "Vendi score", "Drift", "Reward hacking"))


def _mark_notes(chapter: Chapter) -> list[str]:
    spec = chapter.experiment.table
    references = {
        full_label(found) for row in spec.rows if (found := reference_of(spec, row)) is not None
    }
    if not references:
        return []
    note = (
        f"▲ ▼: above or below {' or '.join(sorted(references))} with p < 0.05 after Holm's "
        "correction over the row's scores; △ ▽: before the correction only. They are about what "
        "the row's intervals are about."
    )
    return [note]


def _facts(chapter: Chapter) -> tuple[tuple[str, str], ...]:
    cells = chapter.cells
    protocols = sorted({cell.info.protocol.name for cell in cells})
    prompts = sorted({len(cell.scores["prompt_id"].unique()) for cell in cells})
    total = len(cells) + len(chapter.gaps)
    seeds = ", ".join(map(str, chapter.seeds)) or "none"
    return (
        ("Finished", f"{len(cells)} of {total} runs"),
        ("Training seeds", seeds),
        ("Held-out prompts", " or ".join(map(human, prompts)) or "none"),
        ("Protocol", ", ".join(protocols) or "none"),
    )


def _missing(chapter: Chapter) -> tuple[str, ...]:
    rows = {row.key: full_label(row) for row in chapter.experiment.table.rows}
    return tuple(
        f"{rows.get(gap.row, gap.row)}{'' if gap.seed is None else f', seed {gap.seed}'}: "
        f"{gap.reason}"
        for gap in chapter.gaps
    )


def script_json(value: Any) -> Markup:
    """JSON for the inside of a script element: no text in it can end the element or begin one."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - escaped above


def _visible(value: Any) -> Any:
    """``value`` with every text in it as :func:`g2rpo.text.visible` shows it."""
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


class _Draft:
    """A page whose images can be changed while its size is found."""

    def __init__(
        self, profile: Profile, chapters: Sequence[Chapter], documents: Sequence[Document]
    ) -> None:
        self.profile, self.chapters, self.documents = profile, chapters, documents
        self.views = [view_of(chapter) for chapter in chapters]
        self.curves = [curve_data(chapter) for chapter in chapters]
        self.configurations = [one for chapter in chapters for one in configuration_data(chapter)]
        self.provenance = provenance_grid(chapters)
        tables, marks = [v.table for v in self.views], [v.marks for v in self.views]
        self.overview = overview_grid(chapters, tables, marks)

    def render(self, galleries: Sequence[Gallery], fitted: Fitted) -> str:
        names, uris = fitted.encoder.names, fitted.encoder.uris
        pictures = [
            picture_data(chapter, gallery, names)
            for chapter, gallery in zip(self.chapters, fitted.galleries, strict=True)
        ]
        style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
        script = "\n".join((TEMPLATES / n).read_text(encoding="utf-8") for n in SCRIPTS)
        data = {
            "chapters": {
                c.name: {"curves": curves, "pictures": shown}
                for c, curves, shown in zip(self.chapters, self.curves, pictures, strict=True)
            },
            "configurations": self.configurations,
        }
        return (
            _environment()
            .get_template("page.html.j2")
            .render(
                profile=self.profile,
                views=self.views,
                curves=self.curves,
                pictures=pictures,
                galleries=galleries,
                sheets=[_png_uri(gallery.sheet) for gallery in galleries],
                figures=[_png_uri(document.figure) for document in self.documents],
                overview=self.overview,
                documents=self.documents,
                cost_parts=grids.COST_PARTS,
                picture_notes=fitted.notes,
                provenance=self.provenance,
                data=script_json(_visible(data)),
                images=script_json(uris),
                # Our own files, hashed so that the page runs no other script and no other style.
                style=Markup(style),  # noqa: S704
                script=Markup(script),  # noqa: S704
                style_digest=_digest(style),
                script_digest=_digest(script),
                anchor=grids.anchor,
            )
        )


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
        profile: of all chapters.
        chapters: the experiments in order.
        limit: bytes that the page may have; images are left out, and that is said, until it fits.
        documents: findings that are no experiment's table, shown after the experiments.

    Raises:
        UserError: there is nothing to show, cells do not fit, or even without images the page is
            larger than ``limit``.
    """
    if not any(chapter.cells for chapter in chapters):
        raise UserError("no finished cells to report")
    draft = _Draft(profile, chapters, documents)
    galleries = [gather_pictures(chapter) for chapter in chapters]
    empty = draft.render(galleries, fit(galleries, 0))
    # What names images and scores grows with them.
    taken = len(empty.encode())
    if taken > limit:
        raise UserError(
            f"the report has {taken / 1e6:.1f} MB without any image, more than {limit / 1e6:.1f} "
            "MB: report fewer experiments at a time"
        )
    room = limit - taken
    for _ in range(4):
        fitted = fit(galleries, room)
        html = draft.render(galleries, fitted)
        excess = len(html.encode()) - limit
        if excess <= 0:
            return Page(html, fitted.notes)
        room -= excess + room // 20
    return Page(empty, fit(galleries, 0).notes)
