"""The part of the page for one experiment: facts, sentences, tables and curves."""

from pathlib import Path
from typing import Any

from benchmarks.evaluation.statistics import human
from reproduce.report.chapter import Chapter
from reproduce.report.curves import curve_data
from reproduce.report.table_grids import block_grid, comparison_grid, cost_grid, phase_grid
from reproduce.tables.blocks import blocks
from reproduce.tables.model import Table
from reproduce.tables.summary import pair_sentence, pairs


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


def _figures(chapter: Chapter) -> tuple[Path, ...]:
    """The figures that the table declares, where they have been written."""
    folder = chapter.layout.experiment(chapter.profile.name, chapter.name)
    paths = (folder / f"{name}.png" for name in chapter.spec.figures)
    return tuple(path for path in paths if path.is_file())


def _sentences(table: Table) -> tuple[str, ...]:
    """One sentence per pair of compared rows."""
    found = []
    for pair in pairs(table.asked("rows", "baseline")):
        group = table.row(pair[0].first).group
        found.append((f"{group}: " if group else "") + pair_sentence(table, pair))
    return tuple(found)


def _mark_notes(table: Table) -> list[str]:
    marks = [score.mark for row in table.rows for score in row.scores.values()]
    references = {mark.reference for mark in marks if mark is not None}
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
