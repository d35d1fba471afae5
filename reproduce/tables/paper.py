"""The paper's figures, from results/paper/tables.yaml."""

from collections.abc import Mapping
from pathlib import Path

from g2rpo.config import StrictModel, load_yaml, validate
from g2rpo.errors import UserError
from reproduce.experiment.table import PaperColumn, PaperKey, TableName

PAPER_TABLES = Path(__file__).resolve().parents[2] / "results" / "paper" / "tables.yaml"

PAPER_NAMES: tuple[PaperColumn, ...] = ("HPS", "CLIP", "PS", "IR", "UR")
DIGITS = 3
"""Decimals that the paper prints."""


class PaperRow(StrictModel):
    """One published row and its five scores."""

    train: tuple[PaperColumn, ...]
    method: str
    granularities: tuple[int, ...] | None = None
    steps: int | None = None
    HPS: float
    CLIP: float
    PS: float
    IR: float
    UR: float

    @property
    def scores(self) -> Mapping[PaperColumn, float]:
        """The scores by the paper's column names."""
        return {name: getattr(self, name) for name in PAPER_NAMES}


class PaperTables(StrictModel):
    """The three tables, their publication and the model they were measured on."""

    source: str
    model: str
    prompts: str
    table1: tuple[PaperRow, ...]
    table2: tuple[PaperRow, ...]
    table3: tuple[PaperRow, ...]

    @property
    def caption(self) -> str:
        """Caption for the figures in their own block."""
        return (
            f"The paper's figures, for {self.model}: another model, not comparable "
            f"({self.source}, {self.prompts})"
        )

    @property
    def note(self) -> str:
        """Note for a table with the figures next to ours."""
        return f"Paper: the figures of {self.source} ({self.model}, {self.prompts})."

    def row(self, table: TableName, key: PaperKey) -> PaperRow:
        """The one row of ``table`` that matches ``key``.

        Raises:
            UserError: no row or several rows match.
        """
        rows: tuple[PaperRow, ...] = getattr(self, table)
        wanted = key.model_dump(exclude_none=True)
        found = [row for row in rows if wanted.items() <= dict(row).items()]
        if len(found) != 1:
            how_many = "no row" if not found else f"{len(found)} rows"
            raise UserError(
                f"the paper's {table} has {how_many} matching {wanted}; "
                "name exactly one row of results/paper/tables.yaml"
            )
        return found[0]


def load_paper_tables() -> PaperTables:
    """Reads the paper's figures; a missing or malformed file is a :class:`UserError`."""
    return validate(PaperTables, load_yaml(PAPER_TABLES), str(PAPER_TABLES))
