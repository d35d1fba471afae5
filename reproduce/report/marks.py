"""Which scores differ significantly from a row that all are held against."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.evaluation.results import Cell, RowScores
from benchmarks.evaluation.statistics import ALPHA, Comparison, holm, p_equation, signed
from reproduce.tables.comparisons import compare_rows, strongest_label
from reproduce.tables.notes import full_label
from reproduce.tables.spec import RowSpec, TableSpec
from reproduce.tables.values import select_rows


@dataclass(frozen=True)
class Mark:
    """How a score stands to the reference's.

    Attributes:
        comparison: the row minus the reference.
        adjusted: p, corrected by Holm's procedure over the scores of the row.
        reference: what the reference is called.
        digits: decimals of the column.
    """

    comparison: Comparison
    adjusted: float
    reference: str
    digits: int

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.adjusted < ALPHA

    @property
    def symbol(self) -> str:
        """A triangle, filled where it holds after correction, empty where only before; or none."""
        if not self.comparison.p_value < ALPHA:
            return ""
        up = self.comparison.difference > 0
        if self.significant:
            return "▲" if up else "▼"
        return "△" if up else "▽"

    @property
    def sentence(self) -> str:
        """The difference in words."""
        c, digits = self.comparison, self.digits
        return (
            f"{signed(c.difference, digits)} against {self.reference}, 95% interval "
            f"{signed(c.low, digits)} to {signed(c.high, digits)} ({c.label}), "
            f"{p_equation(c.p_value)}, {p_equation(self.adjusted)} after Holm's correction"
        )


def reference_of(spec: TableSpec, row: RowSpec) -> RowSpec | None:
    """What a row is held against: the table's baseline, else the first focus row of its group."""
    rows = {one.key: one for one in spec.rows}
    focus = [rows[key] for key in spec.focus if rows[key].group == row.group]
    found = rows[spec.baseline] if spec.baseline is not None else next(iter(focus), None)
    return None if found is None or found.key == row.key else found


def table_marks(
    spec: TableSpec, cells: Sequence[Cell], *, profile: str
) -> dict[tuple[str, str], Mark]:
    """The comparison of every score with the reference's, by row key and reward.

    Rows that were evaluated under another protocol, or on other prompts, than their reference have
    none.

    Raises:
        UserError: the cells do not fit the table or each other.
    """
    results = select_rows(spec, cells)
    columns = spec.columns_for(profile)
    marks = {}
    for row in spec.rows:
        reference = reference_of(spec, row)
        if reference is None or row.key not in results or reference.key not in results:
            continue
        pair = results[row.key], results[reference.key]
        if not _alike(*pair):
            continue
        known = [c for c in columns if all(c.reward in one.rewards for one in pair)]
        compared = compare_rows(*pair, [c.reward for c in known], strongest_label(*pair))
        adjusted = holm([one.p_value for one in compared])
        for column, one, p_value in zip(known, compared, adjusted, strict=True):
            mark = Mark(one, float(p_value), full_label(reference), column.digits)
            marks[row.key, column.reward] = mark
    return marks


def _alike(first: RowScores, second: RowScores) -> bool:
    one, two = first.cells[0].info.protocol, second.cells[0].info.protocol
    return one == two and first.prompt_ids == second.prompt_ids
