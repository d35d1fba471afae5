"""The primary comparisons, which an experiment's YAML declares, and the methods' order."""

from collections.abc import Mapping, Sequence
from itertools import chain, combinations

from benchmarks.evaluation.power import detectable_difference, interval_deviation
from benchmarks.evaluation.results import RowScores
from benchmarks.evaluation.statistics import p_equation, signed
from reproduce.experiment.table import TableSpec
from reproduce.tables.comparisons import ComparedRows, family_comparisons
from reproduce.tables.headroom import IN_DOMAIN, MARGIN, MEASURES, Scale
from reproduce.tables.model import RowComparison, Table


def planned_comparisons(
    spec: TableSpec, measured: Mapping[str, RowScores], scale: Scale | None
) -> list[RowComparison]:
    """The primary comparisons of every group, then each pair of their rows on the in-domain mean.

    Holm's correction is over the primary comparisons of a group, and separately over its pairs.
    """
    headroom = scale is not None and scale.headroom
    compared = ComparedRows(measured, MEASURES)
    inside = ComparedRows(measured, (IN_DOMAIN,))
    group_of = {row.key: row.group for row in spec.rows}
    families: dict[str, list[tuple[str, str]]] = {}
    for key, others in spec.primary.items():
        families.setdefault(group_of[key], []).extend((key, other) for other in others)
    primary, orders = [], []
    for pairs in families.values():
        rows = dict.fromkeys(chain.from_iterable(pairs))
        primary += family_comparisons(compared, "primary", pairs)
        orders += family_comparisons(inside, "order", combinations(rows, 2))
    return [
        one.model_copy(
            update={
                "detectable": _detectable(one) if one.question == "primary" else None,
                "equivalent": one.low > -MARGIN and one.high < MARGIN if headroom else None,
            }
        )
        for one in (*primary, *orders)
    ]


def _detectable(one: RowComparison) -> float | None:
    """None for trained weights, which say nothing about other seeds."""
    if one.about != "method":
        return None
    deviation = interval_deviation(one.low, one.high, one.count)
    return detectable_difference(deviation, one.count, comparisons=one.family)


def planned_notes(table: Table) -> list[str]:
    """A sentence for each row's primary comparisons, and one for the order of each group's rows."""
    found = table.asked("primary")
    rows = dict.fromkeys(one.first for one in found)
    return [*(_primary_note(table, found, key) for key in rows), *order_notes(table)]


def order_notes(table: Table) -> list[str]:
    """What is known of the order of each group's rows."""
    by_group: dict[str, list[RowComparison]] = {}
    for one in table.asked("order"):
        by_group.setdefault(table.row(one.first).group, []).append(one)
    return [_order_note(table, found) for found in by_group.values()]


def _primary_note(table: Table, found: Sequence[RowComparison], key: str) -> str:
    parts: dict[str, list[str]] = {}
    for one in (one for one in found if one.first == key):
        column, figures = table.column(one.reward), parts.setdefault(one.second, [])
        difference = signed(one.difference, column.digits)
        figures.append(f"{column.label.lower()} {difference} ({p_equation(one.p_holm)})")
    texts = "; ".join(f"{table.row(other).label}, {', '.join(t)}" for other, t in parts.items())
    about = " and ".join(sorted({one.about for one in found if one.first == key}))
    return (
        f"Primary comparisons ({about}) of {table.row(key).full_label}, p after Holm's correction: "
        f"against {texts}."
    )


def _order_note(table: Table, found: Sequence[RowComparison]) -> str:
    group, label = table.row(found[0].first).group, table.column(found[0].reward).label.lower()
    ordered = [_pair(table, one, " above ") for one in found if one.significant]
    note = (
        f"Orders{f' ({group})' if group else ''}: {len(ordered)} of {len(found)} differences in "
        f"{label} are significant after Holm's correction"
        + (f": {', '.join(ordered)}." if ordered else ".")
    )
    if found[0].equivalent is not None:
        close = ", ".join(_pair(table, one, " and ") for one in found if one.equivalent)
        note += f" Shown to differ by less than {MARGIN:.0%} of the headroom: {close or 'none'}."
    return note


def _pair(table: Table, one: RowComparison, between: str) -> str:
    """The labels of two rows, the higher one first."""
    keys = (one.first, one.second) if one.difference > 0 else (one.second, one.first)
    return between.join(table.row(key).label for key in keys)
