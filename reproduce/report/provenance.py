"""Where every number comes from: the run, the commit, the weights and the hardware of each cell."""

from collections.abc import Sequence

from benchmarks.evaluation.results import Cell, Provenance
from benchmarks.evaluation.statistics import NOTHING, human
from reproduce.report.chapter import Chapter, without_root
from reproduce.report.grids import Box, Grid, Heading, anchor, number, text_box
from reproduce.tables.notes import full_label

SHORT = 12
"""Characters of a hash that are shown; the whole is folded away."""
_HEADS = (
    "Row", "Experiment", "Seed", "Training run", "Commit", "Hardware", "Weights and packages",
    "Evaluation", "Iterations", "Scores",
)  # fmt: skip
_NUMERIC = {"Seed", "Iterations", "Scores"}


def provenance_grid(chapters: Sequence[Chapter]) -> Grid:
    """One line for each cell of each chapter."""
    lines, anchors = [], []
    for chapter in chapters:
        rows = {row.key: full_label(row) for row in chapter.experiment.table.rows}
        seen: set[str] = set()
        for cell in chapter.cells:
            key = cell.info.row
            # The table's rows lead to the first cell of theirs.
            more = f"--seed-{cell.info.seed}" if key in seen else ""
            seen.add(key)
            anchors.append(anchor("run", chapter.name, key) + more)
            lines.append(_line(chapter, cell, rows.get(key, key)))
    heads = tuple(Heading(label, numeric=label in _NUMERIC) for label in _HEADS)
    note = (
        "A run's name ends in a hash of its configuration and inputs; the same name is the same "
        "run. Scores counts prompts times judges. Hashes are SHA-256."
    )
    return Grid("Where every number comes from", heads, tuple(lines), tuple(anchors), (note,))


def origin_boxes(origin: Provenance, details: tuple[tuple[str, str], ...]) -> tuple[Box, ...]:
    """Commit and hardware of what was computed, and ``details`` folded away."""
    hardware = _hardware(origin.hardware)
    commit = (origin.git_commit or "unknown")[:SHORT]
    clean = {True: " with uncommitted changes", False: "", None: " (state unknown)"}
    return (
        Box(commit + clean[origin.git_dirty], commit, kind="code"),
        Box(hardware, hardware.lower(), details=tuple(origin.hardware.items())),
        Box("", len(origin.weights), details=details),
    )


def _line(chapter: Chapter, cell: Cell, label: str) -> tuple[Box, ...]:
    info = cell.info
    iteration = info.checkpoint_iteration
    return (
        Box(label, label.lower(), kind="label"),
        text_box(chapter.name),
        number(info.seed, NOTHING if info.seed is None else str(info.seed)),
        text_box(info.runs.get("train", NOTHING), "code"),
        *origin_boxes(info.provenance, _details(cell)),
        text_box(info.runs.get("evaluation", NOTHING), "code"),
        number(iteration, NOTHING if iteration is None else human(iteration)),
        number(len(cell.scores), human(len(cell.scores))),
    )


def _hardware(hardware: dict[str, str]) -> str:
    device = hardware.get("device", "unknown")
    cores = hardware.get("cores")
    return device if cores is None or device != "cpu" else f"cpu, {cores} cores"


def _details(cell: Cell) -> tuple[tuple[str, str], ...]:
    protocol = cell.info.protocol
    said = ("protocol", f"{protocol.name} {protocol.hash}")
    return (*origin_details(cell.info.provenance), said)


def origin_details(origin: Provenance) -> tuple[tuple[str, str], ...]:
    """Hashes of the weights, the whole commit, and packages."""
    weights = [(f"weights of {name}", digest) for name, digest in origin.weights.items()]
    packages = [(name, version) for name, version in origin.packages.items()]
    source = [] if origin.checkpoint is None else [("from", without_root(origin.checkpoint))]
    commit = [] if origin.git_commit is None else [("commit", origin.git_commit)]
    return (*weights, *source, *commit, *packages)
