"""A computed table as Markdown."""

import re
from collections.abc import Sequence

from benchmarks.evaluation.statistics import NOTHING, human
from g2rpo.text import visible
from reproduce.tables.model import HACKING_LABEL, IN_DOMAIN, Column, Number, Row, Score, Table


def to_markdown(table: Table) -> str:
    """The table, its notes and, where it is not comparable, the paper's block."""
    heads = [*_first_heads(table), *((c.label, "---:") for c in table.columns)]
    heads += [("Seeds", "---:"), ("Interval", "---")]
    heads += [(c.label, "---:") for c in table.metrics]
    heads += [(HACKING_LABEL, "---")] if table.metrics else []
    heads += [(c.label, "---:") for c in table.costs]
    lines = [
        [
            *_first_cells(table, group, row),
            *_markdown_scores(row, table.columns),
            str(len(row.seeds) or NOTHING),
            row.about or NOTHING,
            *(_markdown_number(row.metrics.get(c.name)) for c in table.metrics),
            *([markdown_escape(table.hacking_text(row))] if table.metrics else []),
            *(human(row.costs.get(c.name)) for c in table.costs),
        ]
        for group, rows in table.groups
        for row in rows
    ]
    title = f"### {markdown_escape(table.title)} (profile `{table.profile}`)"
    notes = "\n".join(f"- {markdown_escape(note)}" for note in table.all_notes)
    parts = [title, markdown_table(heads, lines), notes]
    if table.published_source is not None:
        parts += [f"**{markdown_escape(table.published_source)}**", _paper_markdown(table)]
    return "\n\n".join(parts) + "\n"


def _paper_markdown(table: Table) -> str:
    heads = [*_first_heads(table), *((c.label, "---:") for c in table.published_columns)]
    lines = [
        [*_first_cells(table, row.group, row), *_markdown_scores(row, table.published_columns)]
        for row in table.published
    ]
    return markdown_table(heads, lines)


def markdown_table(heads: Sequence[tuple[str, str]], lines: Sequence[Sequence[str]]) -> str:
    """A table of ``lines``, escaped already, under headings with their alignment."""
    texts = [[markdown_escape(label) for label, _ in heads], *lines]
    first, *rest = (f"| {' | '.join(cells)} |" for cells in texts)
    return "\n".join([first, f"|{'|'.join(alignment for _, alignment in heads)}|", *rest])


def _first_heads(table: Table) -> list[tuple[str, str]]:
    heads = [(table.row_label, "---")]
    return [(table.group_label, "---"), *heads] if table.grouped else heads


def _first_cells(table: Table, group: str, row: Row) -> list[str]:
    label = markdown_escape(row.label)
    return [markdown_escape(group), label] if table.grouped else [label]


def _markdown_scores(row: Row, columns: Sequence[Column]) -> list[str]:
    texts = [_markdown_number(row.scores.get(column.name)) for column in columns]
    if row.missing is not None:
        texts[0] = f"*missing: {markdown_escape(row.missing)}*"
    return texts


def _markdown_number(number: Number | None) -> str:
    if number is None:
        return NOTHING
    text = number.text
    if isinstance(number, Score):
        text = (f"**{text}**" if number.best else text) + (IN_DOMAIN if number.in_domain else "")
    return text if number.ends is None else f"{text}<br><sub>{number.ends}</sub>"


_MARKDOWN = re.compile(
    r"[\\`*_|<>\[\]~$]"
    r"|&(?=[#\w])"  # an entity
    r"|^[-+#=](?=[-+#=\s]|$)"  # a list, a heading, a rule
)


def markdown_escape(text: str) -> str:
    """``text`` as it should be read inside a Markdown table cell or sentence."""
    one_line = visible(" ".join(text.split()))
    # A number in front would begin a list.
    return re.sub(r"^(\d+)([.)]\s)", r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", one_line))
