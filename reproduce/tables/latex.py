"""A computed table as LaTeX."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.evaluation.statistics import human
from g2rpo.text import CONTROLS
from reproduce.tables.model import HACKING_LABEL, Column, Number, Row, Score, Table, grouped


@dataclass(frozen=True)
class _Float:
    """One ``table*``.

    Attributes:
        suffix: of its label.
        caption: escaped already, as all of it is.
        heads: of the columns.
        alignment: of all columns but the first.
        groups: the lines of each group.
        notes: sentences below.
    """

    suffix: str
    caption: str
    heads: Sequence[str]
    alignment: str
    groups: Sequence[tuple[str, Sequence[str]]]
    notes: Sequence[str] = ()


def to_latex(table: Table) -> str:
    """``table*`` environments to be included by a document that loads booktabs."""
    head = (
        f"% {table.name}, profile {table.profile}. Needs \\usepackage{{booktabs}}.\n"
        f"% What it shows is cited by \\nocite{{*}} with {table.name}.bib.\n"
    )
    return head + "\n\n".join(_environment(table, part) for part in _floats(table)) + "\n"


def _floats(table: Table) -> Iterator[_Float]:
    title = latex_escape(table.title)
    profile = f"(profile {latex_escape(table.profile)})."
    ours = [(name, [row for row in rows if not row.from_paper]) for name, rows in table.groups]
    first = latex_escape(table.row_label)
    yield _Float(
        "",
        f"{title} {profile}",
        [first, *_labels(table.columns), "Seeds", "Interval"],
        "c" * len(table.columns) + "cl",
        [(name, [_score_line(table, row) for row in rows]) for name, rows in table.groups],
        table.all_notes,
    )
    if table.metrics:
        yield _Float(
            "-beside",
            f"{title}: beside the rewards {profile}",
            ["Beside the rewards", *_labels(table.metrics), HACKING_LABEL],
            "c" * len(table.metrics) + "l",
            [(name, [_metric_line(table, row) for row in rows]) for name, rows in ours],
        )
    if table.costs:
        yield _Float(
            "-cost",
            f"{title}: cost of training {profile}",
            ["Cost of training", *(_stacked(column.label) for column in table.costs)],
            "r" * len(table.costs),
            [(name, [_cost_line(table, row) for row in rows]) for name, rows in ours],
        )
    if table.published_source is not None:
        columns = table.published_columns
        yield _Float(
            "-paper",
            f"{latex_escape(table.published_source)}.",
            [first, *_labels(columns)],
            "c" * len(columns),
            [
                (name, [_line(_label(row), _published(row, columns)) for row in rows])
                for name, rows in grouped(table.published)
            ],
        )


def _published(row: Row, columns: Sequence[Column]) -> list[str]:
    return [_number(row.scores.get(column.name)) for column in columns]


def _labels(columns: Sequence[Column]) -> list[str]:
    return [latex_escape(column.label) for column in columns]


def _stacked(label: str) -> str:
    """A long heading, its first word above the others."""
    words = r"\\".join(latex_escape(part) for part in label.split(" ", 1))
    return rf"\begin{{tabular}}[b]{{@{{}}r@{{}}}}{words}\end{{tabular}}"


def _environment(table: Table, part: _Float) -> str:
    body: list[str] = []
    for index, (name, lines) in enumerate(part.groups):
        if table.grouped or index == 0:
            body.append(r"\midrule")
        if table.grouped:
            label = f"{latex_escape(table.group_label)}: {latex_escape(name)}"
            body.append(rf"\multicolumn{{{len(part.heads)}}}{{@{{}}l}}{{\textit{{{label}}}}} \\")
        body += lines
    below = ["", r"\smallskip", r"\begin{minipage}{\linewidth}\scriptsize"]
    below += [*map(latex_escape, part.notes), r"\end{minipage}"]
    return "\n".join(
        [
            r"\begin{table*}[tp]",
            r"\centering",
            rf"\caption{{{part.caption}}}",
            rf"\label{{tab:{table.name}{part.suffix}}}",
            r"\footnotesize",
            r"\setlength{\tabcolsep}{4pt}",
            rf"\begin{{tabular}}{{@{{}}l{part.alignment}@{{}}}}",
            r"\toprule",
            rf"{' & '.join(part.heads)} \\",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *(below if part.notes else []),
            r"\end{table*}",
        ]
    )


def _line(label: str, cells: Sequence[str]) -> str:
    return rf"{' & '.join([label, *cells])} \\"


def _label(row: Row) -> str:
    return rf"{{{latex_escape(row.label)}}}"


def _numbers_line(
    label: str, numbers: Sequence[Number | None], others: Sequence[str], *, intervals: bool
) -> str:
    """Numbers and what follows them; below, where there are any, their intervals."""
    line = _line(label, [*map(_number, numbers), *others])
    if not intervals:
        return line
    ends = ["" if number is None else number.ends for number in numbers]
    cells = [rf" & {{\scriptsize {text}}}" if text else " & " for text in ends]
    below = "".join(cells) + " &" * len(others) + r" \\"
    return "\n".join([line, below, r"\addlinespace[1pt]"])


def _score_line(table: Table, row: Row) -> str:
    width = len(table.columns) + 2
    if row.missing is not None:
        reason = latex_escape(row.missing)
        return _line(
            _label(row), [rf"\multicolumn{{{width}}}{{l@{{}}}}{{\textit{{missing: {reason}}}}}"]
        )
    label = (r"\textit" if row.from_paper else "") + _label(row)
    numbers = [row.scores.get(column.name) for column in table.columns]
    others = [str(len(row.seeds) or "--"), row.about or "--"]
    return _numbers_line(label, numbers, others, intervals=row.about is not None)


def _metric_line(table: Table, row: Row) -> str:
    numbers = [row.metrics.get(column.name) for column in table.metrics]
    hacking = latex_escape(table.hacking_text(row))
    return _numbers_line(_label(row), numbers, [hacking], intervals=row.about is not None)


def _cost_line(table: Table, row: Row) -> str:
    costs = [human(row.costs.get(column.name)) for column in table.costs]
    return _line(_label(row), [latex_escape(cost) for cost in costs])


def _number(number: Number | None) -> str:
    if number is None:
        return "--"
    if not isinstance(number, Score):
        return number.text
    text = rf"\textbf{{{number.text}}}" if number.best else number.text
    return text + (r"\rlap{$^{\dagger}$}" if number.in_domain else "")


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
    """``text`` as LaTeX that prints it on one line; needs no package beyond the kernel.

    White space becomes one space; control characters are left out. What has no command here is
    kept: pdflatex prints Latin letters, lualatex and xelatex what the document's font has.
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
