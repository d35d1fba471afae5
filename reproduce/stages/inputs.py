"""The inputs of a submission: experiment, profile and cells, as they were when submitted."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from g2rpo.checksums import FILES, parse_document, write_document
from g2rpo.config import StrictModel, validate
from g2rpo.errors import UserError
from reproduce.experiment import Experiment, Profile, ResolvedCell
from reproduce.experiment.layout import Layout


class Inputs(StrictModel):
    """The experiment and profile of a submission; cells are read one by one."""

    folder: Path = Field(exclude=True)
    """The folder of the submission."""
    experiment: Experiment
    profile: Profile
    runs: Path
    tables: Path

    @property
    def layout(self) -> Layout:
        """The layout of runs and tables."""
        return Layout(self.runs, self.tables)

    @classmethod
    def load(cls, folder: Path) -> "Inputs":
        """Reads the inputs that :meth:`save` wrote.

        Raises:
            UserError: this version cannot read them.
        """
        path = folder / "inputs" / "experiment.json"
        return validate(cls, {**_read(path), "folder": folder}, str(path))

    def save(self, cells: Iterable[ResolvedCell]) -> None:
        """Writes everything the jobs need into the submission's folder."""
        _write(self.folder / "inputs" / "experiment.json", self)
        for cell in cells:
            _write(self._cells / f"{cell.name}.json", cell)

    @property
    def _cells(self) -> Path:
        return self.folder / "inputs" / "cells"

    def cell(self, file: str) -> ResolvedCell:
        """One cell of the submission, by the name of its file.

        Raises:
            UserError: this version cannot read it.
        """
        path = self._cells / file
        return validate(ResolvedCell, {**_read(path), "profile": self.profile}, str(path))

    def cells(self) -> list[ResolvedCell]:
        """All cells of the submission, sorted by row and seed."""
        cells = [self.cell(path.name) for path in sorted(self._cells.glob("*.json"))]
        return sorted(cells, key=lambda cell: (cell.key, cell.seed or 0))


def _write(path: Path, model: StrictModel) -> None:
    # An empty list of files makes the document carry a checksum of its own.
    write_document(path, {**model.model_dump(mode="json"), FILES: {}})


def _read(path: Path) -> Mapping[str, Any]:
    try:
        document = parse_document(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); submit again") from None
    document.pop(FILES, None)
    return document
