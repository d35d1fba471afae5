"""Findings that are no table of runs: what stands as Markdown beside the tables of a profile."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from benchmarks.evaluation.results import Provenance
from reproduce.report.grids import Box, Column, Grid, Heading, make_grid, number, text_box
from reproduce.report.overview import origin_columns
from reproduce.report.pictures import SHEET_BYTES

READING = "README.md"
"""The words about all tables of a profile."""
_BELOW = "<br><sub>"
_DROPPED = {"link_open", "link_close", "image"}
"""Links and images lead to files beside the Markdown, which the page does not have."""


@dataclass(frozen=True)
class Document:
    """A Markdown file as the page shows it.

    Attributes:
        name: the folder that it stands in, or ``reading``.
        title: its first heading.
        parts: HTML of paragraphs, lists and headings (from ``h3``), and tables.
        figure: a picture that stands beside it.
        origins: of each cell behind it, where its numbers come from; None where that is not kept.
    """

    name: str
    title: str
    parts: tuple[Markup | Grid, ...]
    figure: Path | None = None
    origins: Grid | None = None


def find_documents(folder: Path, shown: Collection[str]) -> list[Document]:
    """The reading of a profile, then ``NAME/NAME.md`` of each folder that has no cells.

    Args:
        folder: of the profile's tables.
        shown: names that are chapters already.
    """
    paths = {"reading": folder / READING}
    for path in sorted(folder.glob("*/*.md")):
        name = path.parent.name
        if path.stem == name and name not in shown and not (path.parent / "cells").is_dir():
            paths[name] = path
    return [read_document(name, path) for name, path in paths.items() if path.is_file()]


def read_document(name: str, path: Path) -> Document:
    """Parses a Markdown file; HTML in it is shown as the text that it is."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(path.read_text(encoding="utf-8"))
    title, tokens = _without_title(tokens, name)
    parts: list[Markup | Grid] = []
    for block in _blocks(tokens):
        if block[0].type == "table_open":
            parts.append(_grid(block, title))
        else:
            html = parser.renderer.render(_shown(block), parser.options, {})
            parts.append(Markup(html))  # noqa: S704 - the renderer escapes all text
    figure = path.with_suffix(".png")
    there = figure.is_file() and figure.stat().st_size <= SHEET_BYTES
    origins = _origins(path.with_suffix(".json"))
    return Document(name, title, tuple(parts), figure if there else None, origins)


def _origins(path: Path) -> Grid | None:
    """The cells of the JSON beside a document, as far as each says what it was computed with."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found = [(c["row"], c["seed"], Provenance.model_validate(c["provenance"])) for c in cells]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    columns: list[Column[tuple[str, int, Provenance]]] = [
        Column("Row", lambda cell: text_box(cell[0], "label")),
        Column("Seed", lambda cell: number(cell[1], str(cell[1])), numeric=True),
        *origin_columns(lambda cell: cell[2]),
    ]
    return make_grid("Where these numbers come from", columns, found) if found else None


def _without_title(tokens: Sequence[Token], name: str) -> tuple[str, list[Token]]:
    if not tokens or tokens[0].type != "heading_open":
        return name, list(tokens)
    return _text(tokens[1]), list(tokens[3:])


def _blocks(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """Tables by themselves, and what stands between them."""
    block: list[Token] = []
    for token in tokens:
        if token.type == "table_open" and block:
            yield block
            block = []
        block.append(token)
        if token.type == "table_close":
            yield block
            block = []
    if block:
        yield block


def _shown(tokens: Sequence[Token]) -> list[Token]:
    for token in tokens:
        if token.type in {"heading_open", "heading_close"}:
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
        if token.children:
            token.children = [child for child in token.children if child.type not in _DROPPED]
    return list(tokens)


def _text(inline: Token) -> str:
    parts = (
        " " if child.type in {"softbreak", "hardbreak"} else child.content
        for child in inline.children or ()
        if child.type not in _DROPPED
    )
    return "".join(parts).strip()


def _grid(tokens: Sequence[Token], title: str) -> Grid:
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(_text(token))
    head, *body = rows
    numeric = [
        column > 0 and any(row[column] for row in body)
        and all(_number(row[column]) is not None for row in body if row[column])
        for column in range(len(head))
    ]  # fmt: skip
    lines = [
        tuple(_box(text, first=i == 0, numeric=numeric[i]) for i, text in enumerate(row))
        for row in body
    ]
    heads = tuple(Heading(label, numeric=n) for label, n in zip(head, numeric, strict=True))
    return Grid(title, heads, tuple(lines))


def _box(text: str, *, first: bool, numeric: bool) -> Box:
    if numeric:
        # The tables' own Markdown has intervals on a second line.
        shown, _, below = text.partition(_BELOW)
        interval = below.removesuffix("</sub>") or None
        return Box(shown, _number(shown), interval=interval, kind="number")
    return Box(text, text.lower(), kind="label" if first else "text")


def _number(text: str) -> float | None:
    """The figure that a cell begins with: ``0.9`` of ``0.9 (0.8 to 1.0)``, ``16`` of ``16 %``."""
    words = text.replace("−", "-").partition(_BELOW)[0].split()
    try:
        return float(words[0].replace(",", "").rstrip("%")) if words else None
    except ValueError:
        return None
