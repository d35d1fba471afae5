"""The configuration behind each run, flat, so that any two can be laid side by side."""

from typing import Any

from benchmarks.evaluation.results import Cell
from g2rpo.errors import UserError
from reproduce.report.chapter import Chapter, without_root
from reproduce.runs.folders import SETTINGS, read_document
from reproduce.settings import flat

SECTIONS = {"train", "policy", "evaluation", "evaluation_prompts", "checkpoint"}
"""Of a resolved cell, those that are shown."""


def configuration_data(chapter: Chapter) -> list[dict[str, Any]]:
    """Name, configuration and, where it is not sure to be the run's own, a note, of each cell."""
    found = []
    for cell in chapter.cells:
        info = cell.info
        seed = "" if info.seed is None else f", seed {info.seed}"
        known = {"cell": info.row, "method": info.method, "preset": info.preset}
        known["protocol"] = info.protocol.name
        sections, note = _sections(chapter, cell)
        values = {key: without_root(text) for key, text in flat(known | sections).items()}
        label = f"{chapter.labels[info.row]}{seed}"
        found.append({"label": label, "chapter": chapter.name, "note": note, "values": values})
    return found


def _sections(chapter: Chapter, cell: Cell) -> tuple[dict[str, Any], str | None]:
    """The configuration of a cell: its experiment's where that still gives its run."""
    name = cell.info.runs.get("train", "")
    sections: dict[str, Any] = {}
    note = "the files that the configuration is made from are not here"
    try:
        resolved = chapter.resolved(cell)
        if resolved is not None:
            made = chapter.layout.training(resolved).name
            sections = resolved.model_dump(mode="json", include=SECTIONS)
            if made == name:
                return sections, None
            note = "the experiment's files now say something else than this run was made from"
    except UserError:  # its files are not here, and so it cannot be told what it is named
        pass
    try:
        trained = read_document(chapter.layout.runs / name / SETTINGS, ())
    except UserError as error:
        return {}, str(error)
    if trained is not None:
        return {"train": trained}, "as kept in the run's folder"
    return sections, note
