"""The first table of the report: every experiment in one line, with the way to its part."""

from collections.abc import Mapping, Sequence

from benchmarks.evaluation.statistics import NOTHING, human
from reproduce.report.chapter import Chapter
from reproduce.report.grids import Box, Grid, Heading, anchor, number, text_box
from reproduce.report.marks import Mark
from reproduce.tables.values import Table

_HEADS = (
    "Experiment", "What it shows", "Finished", "Seeds", "▲ above", "▼ below", "Hacking",
    "Device-seconds",
)  # fmt: skip
Marks = Mapping[tuple[str, str], Mark]
"""By row key and reward."""
_NUMERIC = {"Finished", "Seeds", "▲ above", "▼ below", "Hacking", "Device-seconds"}


def overview_grid(
    chapters: Sequence[Chapter], tables: Sequence[Table], marks: Sequence[Marks]
) -> Grid:
    """One line for each chapter: how far it is, and what stands out."""
    several = zip(chapters, tables, marks, strict=True)
    lines = tuple(_line(chapter, table, found) for chapter, table, found in several)
    note = (
        "▲, ▼: scores above and below their reference after Holm's correction, as marked in the "
        "experiment's table. Hacking: rows that are flagged for it. Device-seconds: all training "
        "behind the experiment; runs that several share count in each."
    )
    heads = tuple(Heading(label, numeric=label in _NUMERIC) for label in _HEADS)
    return Grid("All experiments", heads, lines, notes=(note,))


def _line(chapter: Chapter, table: Table, marks: Marks) -> tuple[Box, ...]:
    title, name = chapter.experiment.table.title, chapter.name
    total = len(chapter.cells) + len(chapter.gaps)
    settled = [mark.comparison.difference > 0 for mark in marks.values() if mark.significant]
    flags = [row.hacking for group in table.groups for row in group.rows if row.hacking is not None]
    flagged = sum(one.flagged for one in flags)
    costs = [cell.info.cost.device_seconds for cell in chapter.cells if cell.info.cost is not None]
    kind = "number warning" if flagged else "number"
    return (
        Box(name, name, kind="label", link=anchor("chapter", name)),
        text_box(title),
        number(len(chapter.cells) / max(1, total), f"{len(chapter.cells)} of {total}"),
        number(len(chapter.seeds), human(len(chapter.seeds)) if chapter.seeds else NOTHING),
        number(sum(settled), human(sum(settled))),
        number(len(settled) - sum(settled), human(len(settled) - sum(settled))),
        Box(human(flagged) if flags else NOTHING, flagged if flags else None, kind=kind),
        number(sum(costs), human(sum(costs))),
    )
