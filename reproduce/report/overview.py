"""The tables over all experiments: an overview, and the provenance of every number."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from benchmarks.evaluation.results import Cell, Protocol, Provenance
from reproduce.report.chapter import Chapter, without_root
from reproduce.report.grids import (
    Box,
    Column,
    Grid,
    Item,
    anchor,
    make_grid,
    number,
    seed_box,
    text_box,
)

SHORT = 12
"""Characters of a hash that are shown; the rest is collapsed."""


def overview_grid(chapters: Sequence[Chapter]) -> Grid:
    """One line per chapter, with its progress and results."""
    columns: list[Column[Chapter]] = [
        Column("Experiment", _name_box),
        Column("Title", lambda chapter: text_box(chapter.table.title)),
        Column("Finished", _finished_box, numeric=True),
        Column("Seeds", lambda chapter: number(len(chapter.seeds)), numeric=True),
        Column("▲ above", lambda chapter: number(_significant(chapter, 1)), numeric=True),
        Column("▼ below", lambda chapter: number(_significant(chapter, -1)), numeric=True),
        Column("Hacking", _hacking_box, numeric=True),
        Column("Device-seconds", lambda chapter: number(_seconds(chapter)), numeric=True),
    ]
    note = (
        "▲, ▼: scores significantly above and below their reference after Holm's correction, as "
        "marked in the experiment's table. Hacking: rows flagged for reward hacking. "
        "Device-seconds: all training of the experiment, including runs shared with others."
    )
    return make_grid("All experiments", columns, chapters, [note])


def _name_box(chapter: Chapter) -> Box:
    return replace(text_box(chapter.name, "label"), link=anchor("chapter", chapter.name))


def _finished_box(chapter: Chapter) -> Box:
    done = len(chapter.cells)
    total = done + len(chapter.gaps)
    return number(done / max(1, total), f"{done} of {total}")


def _significant(chapter: Chapter, sign: int) -> int:
    marks = (score.mark for row in chapter.table.rows for score in row.scores.values())
    return sum(m is not None and m.significant and m.difference * sign > 0 for m in marks)


def _hacking_box(chapter: Chapter) -> Box:
    found = [r.reward_hacking for r in chapter.table.rows if r.reward_hacking is not None]
    flagged = sum(one.flagged for one in found)
    box = number(flagged) if found else number(None)
    return replace(box, kind="number warning" if flagged else "number")


def _seconds(chapter: Chapter) -> float:
    costs = (cell.info.cost for cell in chapter.cells)
    return sum(cost.device_seconds for cost in costs if cost is not None)


def provenance_grid(chapters: Sequence[Chapter]) -> Grid:
    """One line per cell of each chapter."""
    lines = [(chapter, cell) for chapter in chapters for cell in chapter.cells]
    columns: list[Column[tuple[Chapter, Cell]]] = [
        Column("Row", lambda line: text_box(line[0].labels[line[1].info.row], "label")),
        Column("Experiment", lambda line: text_box(line[0].name)),
        Column("Seed", lambda line: seed_box(line[1].info.seed), numeric=True),
        Column("Training run", lambda line: text_box(line[1].info.runs.get("train"), "code")),
        *origin_columns(lambda line: line[1].info.provenance, lambda line: line[1].info.protocol),
        Column("Evaluation", lambda line: text_box(line[1].info.runs.get("evaluation"), "code")),
        Column("Iterations", lambda line: number(line[1].info.checkpoint_iteration), numeric=True),
        Column("Scores", lambda line: number(len(line[1].scores)), numeric=True),
    ]
    note = (
        "A run's name ends in a hash of its configuration and inputs, so the same name is the same "
        "run. Scores: prompts times reward models. Hashes are SHA-256."
    )
    grid = make_grid("Provenance of every number", columns, lines, [note])
    return replace(grid, anchors=tuple(_anchors(lines)))


def _anchors(lines: Sequence[tuple[Chapter, Cell]]) -> Iterator[str]:
    seen: set[str] = set()
    for chapter, cell in lines:
        name = anchor("run", chapter.name, cell.info.row)
        # The table's rows link to their first cell.
        yield f"{name}--seed-{cell.info.seed}" if name in seen else name
        seen.add(name)


def origin_columns(
    origin: Callable[[Item], Provenance],
    protocol: Callable[[Item], Protocol | None] = lambda _: None,
) -> list[Column[Item]]:
    """Columns for commit, hardware, and what the weights, packages and ``protocol`` were."""
    return [
        Column("Commit", lambda item: _commit_box(origin(item))),
        Column("Hardware", lambda item: _hardware_box(origin(item).hardware)),
        Column("Weights and packages", lambda item: _details_box(origin(item), protocol(item))),
    ]


def _commit_box(origin: Provenance) -> Box:
    commit = (origin.git_commit or "unknown")[:SHORT]
    clean = {True: " with uncommitted changes", False: "", None: " (state unknown)"}
    return Box(commit + clean[origin.git_dirty], commit, kind="code")


def _hardware_box(hardware: Mapping[str, str]) -> Box:
    device, cores = hardware.get("device", "unknown"), hardware.get("cores")
    shown = device if cores is None or device != "cpu" else f"cpu, {cores} cores"
    return replace(text_box(shown), details=tuple(hardware.items()))


def _details_box(origin: Provenance, protocol: Protocol | None) -> Box:
    """Hashes of the weights, the whole commit, packages and protocol, collapsed."""
    weights = [(f"weights of {name}", digest) for name, digest in origin.weights.items()]
    source = [] if origin.checkpoint is None else [("from", without_root(origin.checkpoint))]
    commit = [] if origin.git_commit is None else [("commit", origin.git_commit)]
    shown = [] if protocol is None else [("protocol", f"{protocol.title} {protocol.hash}")]
    details = (*weights, *source, *commit, *origin.packages.items(), *shown)
    return Box("", len(origin.weights), details=details)
