"""Markdown documents beside the tables of a profile."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode
from markupsafe import Markup

from benchmarks.evaluation.results import Provenance
from reproduce.report.grids import Box, Column, Grid, make_grid, number, seed_box, text_box
from reproduce.report.overview import origin_columns
from reproduce.report.pictures import SHEET_BYTES

READING = "README.md"
"""The discussion of all tables of a profile."""
_BELOW = "<br><sub>"
_DROPPED = {"link_open", "link_close", "image"}
"""Links and images point to files that the page does not contain."""


@dataclass(frozen=True)
class Document:
    """A Markdown file as the page shows it.

    Attributes:
        name: its folder, or ``reading``.
        title: its first heading.
        parts: HTML of paragraphs, lists and headings (from ``h3``), and tables.
        figure: the image beside it.
        origins: the provenance of each cell behind it, if known.
    """

    name: str
    title: str
    parts: tuple[Markup | Grid, ...]
    figure: Path | None = None
    origins: Grid | None = None


def find_documents(folder: Path, shown: Collection[str]) -> list[Document]:
    """A profile's ``README.md``, then ``NAME/NAME.md`` of each folder without cells.

    ``shown`` are names that are already chapters.
    """
    paths = {"reading": folder / READING}
    for path in sorted(folder.glob("*/*.md")):
        name = path.parent.name
        if path.stem == name and name not in shown and not (path.parent / "cells").is_dir():
            paths[name] = path
    return [read_document(name, path) for name, path in paths.items() if path.is_file()]


def read_document(name: str, path: Path) -> Document:
    """Parses a Markdown file; HTML in it is shown as text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    nodes = SyntaxTreeNode(parser.parse(path.read_text(encoding="utf-8"))).children
    title = name
    if nodes and nodes[0].type == "heading":
        title, nodes = _text(nodes[0]), nodes[1:]
    parts: list[Markup | Grid] = []
    for node in nodes:
        if node.type == "table":
            parts.append(_grid(node, title))
        else:
            html = parser.renderer.render(_shown(node), parser.options, {})
            parts.append(Markup(html))  # noqa: S704 - the renderer escapes all text
    figure = path.with_suffix(".png")
    there = figure.is_file() and figure.stat().st_size <= SHEET_BYTES
    origins = _origins(path.with_suffix(".json"))
    return Document(name, title, tuple(parts), figure if there else None, origins)


def _origins(path: Path) -> Grid | None:
    """The cells of the JSON beside a document, if they have their provenance."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found = [(c["row"], c["seed"], Provenance.model_validate(c["provenance"])) for c in cells]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    columns: list[Column[tuple[str, int, Provenance]]] = [
        Column("Row", lambda cell: text_box(cell[0], "label")),
        Column("Seed", lambda cell: seed_box(cell[1]), numeric=True),
        *origin_columns(lambda cell: cell[2]),
    ]
    return make_grid("Provenance of these numbers", columns, found) if found else None


def _shown(node: SyntaxTreeNode) -> list[Token]:
    """A block's tokens one heading level lower, without links and images."""
    tokens = node.to_tokens()
    for token in tokens:
        if token.type in {"heading_open", "heading_close"}:
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
        if token.children:
            token.children = [child for child in token.children if child.type not in _DROPPED]
    return tokens


def _text(node: SyntaxTreeNode) -> str:
    """The text of a heading or cell."""
    inline = node.to_tokens()[1]
    parts = (
        " " if child.type in {"softbreak", "hardbreak"} else child.content
        for child in inline.children or ()
        if child.type not in _DROPPED
    )
    return "".join(parts).strip()


def _grid(table: SyntaxTreeNode, title: str) -> Grid:
    head, *body = [
        [_text(cell) for cell in row.children] for part in table.children for row in part.children
    ]
    numeric = [
        column > 0 and any(row[column] for row in body)
        and all(_number(row[column]) is not None for row in body if row[column])
        for column in range(len(head))
    ]  # fmt: skip
    columns = [
        Column[list[str]](label, partial(_box, place, numeric[place]), numeric[place])
        for place, label in enumerate(head)
    ]
    return make_grid(title, columns, body)


def _box(place: int, numeric: bool, row: Sequence[str]) -> Box:
    if not numeric:
        return Box(row[place], row[place].lower(), kind="text" if place else "label")
    # Our tables have intervals on a second line.
    shown, _, below = row[place].partition(_BELOW)
    box = number(_number(shown), shown)
    return replace(box, interval=below.removesuffix("</sub>") or None)


def _number(text: str) -> float | None:
    """The number at the start of a cell: ``0.9`` in ``0.9 (0.8 to 1.0)``, ``16`` in ``16 %``."""
    words = text.replace("−", "-").partition(_BELOW)[0].split()
    try:
        return float(words[0].replace(",", "").rstrip("%")) if words else None
    except ValueError:
        return None
