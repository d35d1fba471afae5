"""A computed table as LaTeX."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from benchmarks.evaluation.statistics import NOTHING
from g2rpo.text import CONTROLS
from reproduce.tables.blocks import Block, Cell, blocks
from reproduce.tables.model import Number, Row, Score, Table

ROWS = 20
"""Rows that fit a page, with their intervals and the notes."""


def to_latex(table: Table) -> str:
    """``table*`` environments for a document that loads booktabs."""
    head = (
        f"% {table.name}, profile {table.profile}. Needs \\usepackage{{booktabs}}.\n"
        f"% Cite everything it rests on with \\nocite{{*}} and {table.name}.bib.\n"
    )
    parts = []
    for block in blocks(table):
        pages = _pages(block)
        for number, page in enumerate(pages, start=1):
            parts.append(_environment(table, page, number, last=number == len(pages)))
    return head + "\n\n".join(parts) + "\n"


def _pages(block: Block) -> list[Block]:
    """The block in parts that fit a page: whole groups, together at most ``ROWS`` rows."""
    pages: list[list[tuple[Row, tuple[Cell, ...]]]] = [[]]
    for _, members in groupby(block.lines, lambda line: line[0].group):
        lines = list(members)
        if pages[-1] and len(pages[-1]) + len(lines) > ROWS:
            pages.append([])
        pages[-1] += lines
    return [replace(block, lines=tuple(lines)) for lines in pages]


def _environment(table: Table, block: Block, page: int, *, last: bool) -> str:
    captions = {"": block.title, "-paper": block.title}
    title = f"{table.title}, {block.title.lower()} (profile {table.profile})"
    caption = latex_escape(captions.get(block.suffix, title)) + ", continued" * (page > 1)
    labels = [latex_escape(heading.label) for heading in block.headings]
    figure = "c"
    if block.suffix == "-cost":
        labels, figure = [_stacked(heading.label) for heading in block.headings], "r"
    alignment = "".join(figure if heading.numeric else "l" for heading in block.headings)
    body: list[str] = []
    group = None
    for row, cells in block.lines:
        if group is None or (table.grouped and row.group != group):
            body.append(r"\midrule")
            if table.grouped:
                name = f"{latex_escape(table.group_label)}: {latex_escape(row.group)}"
                width = len(labels) + 1
                body.append(rf"\multicolumn{{{width}}}{{@{{}}l}}{{\textit{{{name}}}}} \\")
        group = row.group
        body += _lines(block, row, cells)
    notes = table.all_notes if last and not block.suffix else []
    below = [r"\smallskip", r"\begin{minipage}{\linewidth}\scriptsize"]
    below = ["", *below, *map(latex_escape, notes), r"\end{minipage}"]
    return "\n".join(
        [
            r"\begin{table*}[tp]",
            r"\centering",
            rf"\caption{{{caption}.}}",
            rf"\label{{tab:{table.name}{block.suffix}{f'-{page}' * (page > 1)}}}",
            r"\footnotesize",
            r"\setlength{\tabcolsep}{3pt}",
            rf"\begin{{tabular}}{{@{{}}l{alignment}@{{}}}}",
            r"\toprule",
            _line(latex_escape(table.row_label), labels),
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *(below if notes else []),
            r"\end{table*}",
        ]
    )


def _stacked(label: str) -> str:
    """A long heading, its first word above the others."""
    words = r"\\".join(latex_escape(part) for part in label.split(" ", 1))
    return rf"\begin{{tabular}}[b]{{@{{}}r@{{}}}}{words}\end{{tabular}}"


def _line(label: str, cells: Sequence[str]) -> str:
    return rf"{' & '.join([label, *cells])} \\"


def _lines(block: Block, row: Row, cells: Sequence[Cell]) -> list[str]:
    """A row and, where it has intervals, a second line with them."""
    label = rf"{{{latex_escape(row.label)}}}"
    if row.missing is not None and not block.suffix:
        reason = rf"\textit{{missing: {latex_escape(row.missing)}}}"
        return [_line(label, [rf"\multicolumn{{{len(cells)}}}{{l@{{}}}}{{{reason}}}"])]
    if row.from_paper and not block.suffix:
        label = rf"\textit{label}"
    lines = [_line(label, [_cell(cell) for cell in cells])]
    if row.about is not None and any(isinstance(cell, Number) for cell in cells):
        ends = [cell.ends if isinstance(cell, Number) else None for cell in cells]
        lines.append(_line("", [rf"{{\scriptsize {text}}}" if text else "" for text in ends]))
        lines.append(r"\addlinespace[1pt]")
    return lines


def _cell(cell: Cell) -> str:
    if not isinstance(cell, Number):
        return latex_escape(cell or NOTHING)
    if not isinstance(cell, Score):
        return cell.text
    text = rf"\textbf{{{cell.text}}}" if cell.best else cell.text
    return text + (r"\rlap{$^{\dagger}$}" if cell.in_domain else "")


_LATEX_CHARACTERS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    '"': r"{''}",
    "–": "--",
    "—": "---",
    "−": "$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≠": r"$\neq$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "→": r"$\rightarrow$",
    "†": r"$^{\dagger}$",
    "\u00a0": "~",
}

_GREEK = re.compile(r"GREEK (SMALL|CAPITAL) LETTER (\w+)$")
_GREEK_CAPITALS = {
    "GAMMA", "DELTA", "THETA", "LAMDA", "XI", "PI", "SIGMA", "UPSILON", "PHI", "PSI", "OMEGA",
}  # fmt: skip


def latex_escape(text: str) -> str:
    """Escapes ``text`` for LaTeX, on one line and without packages beyond the kernel.

    White space becomes one space and control characters are dropped. Other characters are kept:
    pdflatex prints Latin letters, lualatex and xelatex whatever the document's font has.
    """
    # A blank line would end the paragraph, which captions and table cells must not do.
    one_line = CONTROLS.sub("", re.sub(r"[^\S\u00a0]+", " ", text))
    return "".join(map(_latex_character, unicodedata.normalize("NFC", one_line)))


def _latex_character(character: str) -> str:
    if character in _LATEX_CHARACTERS or character.isascii():
        return _LATEX_CHARACTERS.get(character, character)
    tag, _, code = unicodedata.decomposition(character).partition(" ")
    if tag in ("<super>", "<sub>"):
        inner = "".join(chr(int(part, 16)) for part in code.split())
        command = "textsuperscript" if tag == "<super>" else "textsubscript"
        return rf"\{command}{{{latex_escape(inner)}}}"
    if greek := _GREEK.match(unicodedata.name(character, "")):
        name = greek[2].replace("LAMDA", "LAMBDA").lower()
        if greek[1] == "SMALL" and name != "omicron":
            return rf"$\{name}$"
        if greek[1] == "CAPITAL" and greek[2] in _GREEK_CAPITALS:
            return rf"$\{name.capitalize()}$"
    return character
