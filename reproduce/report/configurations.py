"""The configuration of each run, flattened so that any two can be compared."""

from typing import Any

from benchmarks.evaluation.results import Cell
from g2rpo.errors import UserError
from reproduce.report.chapter import Chapter, without_root
from reproduce.runs.folders import SETTINGS, read_document
from reproduce.settings import flat

SECTIONS = {"train", "policy", "evaluation", "evaluation_prompts", "checkpoint"}
"""The sections of a resolved cell that are shown."""


def configuration_data(chapter: Chapter) -> list[dict[str, Any]]:
    """Each cell's label and configuration, with a note if it may not be the run's own."""
    found = []
    for cell in chapter.cells:
        info = cell.info
        seed = "" if info.seed is None else f", seed {info.seed}"
        known = {"cell": info.row, "method": info.method, "preset": info.preset}
        known["protocol"] = info.protocol.title
        sections, note = _sections(chapter, cell)
        values = {key: without_root(text) for key, text in flat(known | sections).items()}
        label = f"{chapter.labels[info.row]}{seed}"
        found.append({"label": label, "chapter": chapter.name, "note": note, "values": values})
    return found


def _sections(chapter: Chapter, cell: Cell) -> tuple[dict[str, Any], str | None]:
    """The configuration of a cell, from its experiment if that still resolves to the same run."""
    name = cell.info.runs.get("train", "")
    sections: dict[str, Any] = {}
    note = "the files behind this configuration are missing"
    try:
        resolved = chapter.resolved(cell)
        if resolved is not None:
            made = chapter.layout.training(resolved).name
            sections = resolved.model_dump(mode="json", include=SECTIONS)
            if made == name:
                return sections, None
            note = "the experiment has changed since this run"
    except UserError:  # its files are missing, so its name cannot be computed
        pass
    try:
        trained = read_document(chapter.layout.runs / name / SETTINGS, ())
    except UserError as error:
        return {}, str(error)
    if trained is not None:
        return {"train": trained}, "from the run's folder"
    return sections, note
