"""The configuration behind each run, flat, so that any two can be laid side by side."""

from collections.abc import Mapping
from typing import Any

from benchmarks.evaluation.results import Cell
from g2rpo.errors import UserError
from reproduce.experiment import ResolvedCell
from reproduce.report.chapter import Chapter, without_root
from reproduce.runs.folders import SETTINGS, read_document
from reproduce.settings import flat


def configuration_data(chapter: Chapter) -> list[dict[str, Any]]:
    """Name, configuration and, where it is not sure to be the run's own, a note, of each cell."""
    found = []
    for cell in chapter.cells:
        info = cell.info
        seed = "" if info.seed is None else f", seed {info.seed}"
        values, note = _configuration(chapter, cell)
        found.append(
            {
                "label": f"{chapter.labels[info.row]}{seed}",
                "chapter": chapter.name,
                "note": note,
                "values": values,
            }
        )
    return found


def _configuration(chapter: Chapter, cell: Cell) -> tuple[dict[str, str], str | None]:
    known = {
        "cell": cell.info.row, "method": cell.info.method, "preset": cell.info.preset,
        "protocol": cell.info.protocol.name,
    }  # fmt: skip
    try:
        resolved = chapter.resolved(cell)
        name = None if resolved is None else chapter.layout.training(resolved).name
    except UserError:  # its files are not here, and so it cannot be told what it is named
        resolved, name = None, None
    if resolved is not None and name == cell.info.runs.get("train"):
        return _flat(known | _sections(resolved)), None
    try:
        run = chapter.layout.runs / cell.info.runs.get("train", "")
        trained = read_document(run / SETTINGS, ())
    except UserError as error:
        return _flat(known), str(error)
    if trained is not None:
        return _flat(known | {"train": trained}), "as kept in the run's folder"
    if resolved is not None:
        note = "the experiment's files now say something else than this run was made from"
        return _flat(known | _sections(resolved)), note
    return _flat(known), "the files that the configuration is made from are not here"


def _sections(cell: ResolvedCell) -> dict[str, Any]:
    return {
        "train": None if cell.train is None else cell.train.model_dump(mode="json"),
        "policy": cell.policy.model_dump(mode="json"),
        "evaluation": cell.evaluation.model_dump(mode="json"),
        "evaluation_prompts": cell.evaluation_prompts,
        "checkpoint": None if cell.checkpoint is None else cell.checkpoint.model_dump(mode="json"),
    }


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys; paths as within the repository."""
    return {key: without_root(text) for key, text in flat(values).items()}
