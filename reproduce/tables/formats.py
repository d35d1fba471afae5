"""A computed table as files in every format."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evaluation.statistics import ALPHA
from g2rpo.files import atomic_write_text
from g2rpo.text import csv_text
from reproduce.tables.latex import to_latex
from reproduce.tables.markdown import to_markdown
from reproduce.tables.model import Column, Number, Row, Table
from reproduce.tables.references import bibliography
from reproduce.tables.summary import summary_markdown

_Line = list[tuple[str, str]]
"""A CSV line as headings, which may repeat, and values."""
JSON_DIGITS = 7
"""Significant digits, as in the CSV; further ones differ between machines."""


def write_formats(table: Table, output: Path) -> dict[str, Path]:
    """Writes a table in every format; returns the file of each.

    In the folder ``output``: ``<name>.md``, ``.csv``, ``.tex``, ``.json``, ``.bib``,
    ``<name>_reading.md`` (the summary), with the paper's figures ``<name>_paper.csv`` and, if the
    prompts have styles, ``<name>_by_style.md`` and ``.csv``.
    """
    texts = {
        "markdown": (f"{table.name}.md", to_markdown(table)),
        "csv": (f"{table.name}.csv", to_csv(table)),
        "latex": (f"{table.name}.tex", to_latex(table)),
        "json": (f"{table.name}.json", to_json(table)),
        "bibtex": (f"{table.name}.bib", bibliography(table.references)),
    }
    if table.published_source is not None and table.published:
        texts["paper_csv"] = (f"{table.name}_paper.csv", paper_csv(table))
    if table.styles is not None:
        texts["by_style"] = (f"{table.styles.name}.md", to_markdown(table.styles))
        texts["by_style_csv"] = (f"{table.styles.name}.csv", to_csv(table.styles))
    texts["summary"] = (f"{table.name}_reading.md", summary_markdown(table))
    for name, text in texts.values():
        atomic_write_text(output / name, text)
    return {kind: output / name for kind, (name, _) in texts.items()}


# CSV


def to_csv(table: Table) -> str:
    """One line per row, all digits: group, row, seeds, interval label, scores, metrics, costs.

    Each reward has its score, the ends of its interval, and 1 or 0 for in-domain and best. Each
    share of headroom and each metric has its value and ends. ``hacking`` is 1, 0 or empty;
    ``hacking_fell`` lists what fell. ``protocol`` is the evaluation's name and hash.
    """
    lines = []
    shares = (*table.headroom_columns, *table.columns) if table.headroom_columns else ()
    protocols = {one.hash: f"{one.title} ({one.hash})" for one in table.protocols}
    for row in table.lines:
        line = _csv_scores(row, table.columns, "paper" if row.from_paper else "measured")
        for column in shares:
            line += _csv_number(f"headroom_{column.name}", row.headroom.get(column.name))
        for column in table.metrics:
            line += _csv_number(column.name, row.metrics.get(column.name))
        if table.metrics:
            found = row.reward_hacking
            line.append(("hacking", "" if found is None else str(int(found.flagged))))
            line.append(("hacking_fell", "" if found is None else ";".join(found.fell)))
        line += [(column.name, _figures(row.costs.get(column.name))) for column in table.costs]
        used = dict.fromkeys(protocols[source.protocol] for source in row.sources)
        lines.append([*line, ("protocol", csv_text("; ".join(used)))])
    return _csv_lines(lines)


def paper_csv(table: Table) -> str:
    """The paper's block as CSV."""
    columns, source = table.published_columns, table.published_source or ""
    lines = [_csv_scores(row, columns, source) for row in table.published]
    return _csv_lines(lines)


def _csv_lines(lines: Sequence[_Line]) -> str:
    headings = [heading for heading, _ in lines[0]]
    return csv_table(headings, [[value for _, value in line] for line in lines])


def _csv_scores(row: Row, columns: Sequence[Column], source: str) -> _Line:
    """The start of a line: the row and its scores."""
    first = {
        "source": source,
        "group": row.group,
        "row": row.key,
        "label": row.label,
        "seeds": "" if row.from_paper or row.missing is not None else str(len(row.seeds)),
        "interval": row.about or "",
        "missing": row.missing or "",
    }
    line = [(heading, csv_text(text)) for heading, text in first.items()]
    for column in columns:
        name, score = column.name, row.scores.get(column.name)
        in_domain = name in row.trained_on if score is None else score.in_domain
        line += _csv_number(name, score)
        line.append((f"{name}_in_domain", str(int(in_domain))))
        line.append((f"{name}_best", str(int(score is not None and score.best))))
    return line


def _csv_number(name: str, number: Number | None) -> _Line:
    ends = (None,) * 3 if number is None else (number.mean, number.low, number.high)
    headings = (name, f"{name}_low", f"{name}_high")
    return list(zip(headings, map(_figures, ends), strict=True))


def _figures(value: float | None) -> str:
    return "" if value is None else f"{value:.7g}"


def csv_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A CSV file's text."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([heads, *lines])
    return buffer.getvalue()


# JSON


def to_json(table: Table) -> str:
    """The table for programs: every number, and what it was computed from."""
    data = _rounded(table.model_dump(mode="json", exclude_none=True))
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        rounded = float(f"{value:.{JSON_DIGITS}g}")
        # Rounding must not move a p-value across the significance level.
        return value if (value < ALPHA) != (rounded < ALPHA) else rounded
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value
