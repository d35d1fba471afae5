"""Rows of a table compared: marks, the comparisons that a table asks for, reward hacking."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from benchmarks.evaluation.metrics import DISTANCE, VENDI
from benchmarks.evaluation.results import RowScores
from benchmarks.evaluation.statistics import (
    ALPHA,
    MIN_SEEDS,
    Comparison,
    Interval,
    Label,
    checkpoint_comparisons,
    checkpoint_improvements,
    corrected,
    method_comparisons,
    method_improvements,
)
from reproduce.experiment.table import CostColumn, PaperColumn, RowSpec, TableSpec
from reproduce.tables.model import (
    NOT_SIGNIFICANT,
    Number,
    Question,
    RewardHacking,
    Row,
    RowComparison,
)
from reproduce.tables.paper import DIGITS, PaperTables

DIVERSITY = (DISTANCE, VENDI)
"""Metrics whose fall counts as reward hacking; drift is neither good nor bad."""
COMPARED_COSTS: tuple[CostColumn, ...] = (
    "rollout_evaluations",
    "training_backwards",
    "images_scored",
    "device_seconds",
)


def shared_seeds(first: RowScores, second: RowScores) -> tuple[int, ...]:
    """The seeds that both rows have; if one is a model without seeds, the other's."""
    if not first.seeds or not second.seeds:
        return (*first.seeds, *second.seeds)
    return tuple(sorted({*first.seeds} & {*second.seeds}))


def strongest_label(first: RowScores, second: RowScores) -> Label:
    """``method`` if two rows share three seeds, else ``checkpoint``."""
    return "method" if len(shared_seeds(first, second)) >= MIN_SEEDS else "checkpoint"


def alike(first: RowScores, second: RowScores) -> bool:
    """Whether two rows were evaluated under one protocol, on the same prompts."""
    return first.protocol == second.protocol and first.prompt_ids == second.prompt_ids


def compare_rows(
    first: RowScores, second: RowScores, rewards: Sequence[str]
) -> dict[str, Comparison]:
    """First minus second, by reward that both rows were scored on.

    ``method`` comparisons pair the means of shared seeds. ``checkpoint`` comparisons pair the
    prompts, averaged over the shared seeds, or over each row's own seeds if they share none.
    """
    known, shared = _shared(first, second, rewards)
    found = _compare(first.scores(known, shared), second.scores(known, shared), first, second)
    return dict(zip(known, found, strict=True))


def improvements(
    first: RowScores, second: RowScores, rewards: Sequence[str]
) -> dict[str, Interval]:
    """Probability that ``first`` scores higher than ``second`` on a prompt, by reward.

    Takes the arguments of :func:`compare_rows`. Trainings are paired by shared seed; if the rows
    share none, every training of ``first`` is paired with every one of ``second``.
    """
    known, shared = _shared(first, second, rewards)
    one, two = first.scores(known, shared), second.scores(known, shared)
    if shared is None:
        cells = one.shape[1], two.shape[1]
        one, two = np.repeat(one, cells[1], axis=1), np.tile(two, (1, cells[0], 1))
    method = strongest_label(first, second) == "method"
    found = (method_improvements if method else checkpoint_improvements)(one, two)
    return dict(zip(known, found, strict=True))


def compare_metric(first: RowScores, second: RowScores, metric: str) -> Comparison | None:
    """First minus second on one metric, as :func:`compare_rows` does on scores.

    None if the two were not measured on the same prompts.
    """
    if metric not in first.metrics or metric not in second.metrics:
        return None
    _, shared = _shared(first, second, ())
    (one, prompts), (two, others) = (row.metric(metric, shared) for row in (first, second))
    return _compare(one, two, first, second)[0] if prompts == others else None


def _shared(
    first: RowScores, second: RowScores, rewards: Sequence[str]
) -> tuple[list[str], list[int] | None]:
    """The rewards and seeds that both rows have; None for no shared seed."""
    known = [name for name in rewards if name in first.rewards and name in second.rewards]
    return known, sorted(set(first.seeds) & set(second.seeds)) or None


def _compare(
    one: npt.NDArray[np.float64],
    two: npt.NDArray[np.float64],
    first: RowScores,
    second: RowScores,
) -> list[Comparison]:
    """Compares two arrays [quantities, cells, prompts]."""
    if strongest_label(first, second) == "checkpoint":
        return checkpoint_comparisons(one.mean(axis=1), two.mean(axis=1))
    return method_comparisons(*np.broadcast_arrays(one.mean(axis=2), two.mean(axis=2)))


class ComparedRows:
    """The comparisons of a table's rows on its rewards, each computed once.

    Attributes:
        results: the rows by key.
        rewards: the score columns.
    """

    def __init__(self, results: Mapping[str, RowScores], rewards: Sequence[str]) -> None:
        self.results, self.rewards = results, rewards
        self._known: dict[tuple[str, str], dict[str, Comparison]] = {}

    def __call__(self, first: str, second: str) -> dict[str, Comparison]:
        """First minus second, by reward."""
        if (second, first) in self._known:
            found = self._known[second, first]
            return {reward: _reversed(one) for reward, one in found.items()}
        if (first, second) not in self._known:
            rows = self.results[first], self.results[second]
            self._known[first, second] = compare_rows(*rows, self.rewards)
        return self._known[first, second]

    def hacking(self, key: str, baseline: str | None, about: Label | None) -> RewardHacking | None:
        """Tests a trained row against the baseline on the table's rewards and on diversity.

        Holm's correction is over these comparisons. None without a baseline under the same
        protocol, with too few shared seeds for ``about`` (the kind of the row's intervals), or if
        no training reward is among the columns.
        """
        if baseline is None or key == baseline or not {key, baseline} <= self.results.keys():
            return None
        row, base = self.results[key], self.results[baseline]
        trained = row.cells[0].info.train_rewards
        if not alike(row, base) or strongest_label(row, base) != about:
            return None
        compared = dict(self(key, baseline))
        if not set(trained) & set(compared):
            return None
        for metric in DIVERSITY:
            found = compare_metric(row, base, metric)
            if found is not None:
                compared[metric] = found
        adjusted = corrected(compared)
        significant = [name for name in compared if adjusted[name] < ALPHA]
        rose = [n for n in significant if compared[n].difference > 0 and n in trained]
        fell = [n for n in significant if compared[n].difference < 0 and n not in trained]
        return RewardHacking(flagged=bool(rose and fell), rose=tuple(rose), fell=tuple(fell))


def _reversed(found: Comparison) -> Comparison:
    return replace(found, difference=-found.difference, low=-found.high, high=-found.low)


# What a table asks for


def reference_of(spec: TableSpec, row: RowSpec) -> RowSpec | None:
    """A row's reference: the table's baseline, else the first focus row of its group."""
    rows = {one.key: one for one in spec.rows}
    focus = [rows[key] for key in spec.focus if rows[key].group == row.group]
    found = rows[spec.baseline] if spec.baseline is not None else next(iter(focus), None)
    return None if found is None or found.key == row.key else found


def row_marks(spec: TableSpec, row: RowSpec, compared: ComparedRows) -> dict[str, RowComparison]:
    """Compares a row's scores with its reference's; empty if they were evaluated differently."""
    reference = reference_of(spec, row)
    if reference is None:
        return {}
    found = family_comparisons(compared, "rows", [(row.key, reference.key)])
    return {one.reward: one for one in found}


def _pairs(spec: TableSpec) -> Iterator[tuple[Question, RowSpec, RowSpec]]:
    """Every pair to compare, once: each ``focus`` row with the others of its group and with the
    ``baseline``, which is a second question."""
    rows = {row.key: row for row in spec.rows}
    seen: set[frozenset[str]] = set()
    for focus in (rows[key] for key in spec.focus):
        members = [row for row in spec.rows if row.group == focus.group]
        others: list[tuple[Question, RowSpec]] = [
            ("rows", row) for row in members if row.key != spec.baseline
        ]
        if spec.baseline is not None:
            others.append(("baseline", rows[spec.baseline]))
        for question, other in others:
            pair = frozenset((focus.key, other.key))
            if len(pair) == 2 and pair not in seen:
                seen.add(pair)
                yield question, focus, other


def row_comparisons(
    spec: TableSpec,
    compared: ComparedRows,
    rows: Sequence[Row],
    paper: PaperTables,
) -> list[RowComparison]:
    """The comparisons that the table's ``focus`` and ``baseline`` ask for.

    With three shared seeds a comparison is seed-level (paired t-test on seed means), else
    prompt-level (paired over prompts). Holm's correction is over the rows and score columns of
    each group and question.
    """
    families: dict[tuple[str, Question], list[tuple[str, str]]] = {}
    for question, focus, other in _pairs(spec):
        families.setdefault((focus.group, question), []).append((focus.key, other.key))
    lines, specs = {row.key: row for row in rows}, {row.key: row for row in spec.rows}
    columns = {column.reward: column for column in spec.columns}
    return [
        one.model_copy(
            update={
                "published_difference": _published(
                    spec, paper, (specs[one.first], specs[one.second]), columns[one.reward].paper
                ),
                "cost_ratios": _cost_ratios(lines[one.first], lines[one.second]),
            }
        )
        for (_, question), pairs in families.items()
        for one in family_comparisons(compared, question, pairs)
    ]


def family_comparisons(
    compared: ComparedRows, question: Question, pairs: Iterable[tuple[str, str]]
) -> list[RowComparison]:
    """Compares pairs of rows on every reward, with Holm's correction over all of it.

    Pairs without results, or evaluated differently, are left out.
    """
    results = compared.results
    pairs = [
        (first, second)
        for first, second in pairs
        if results.keys() >= {first, second} and alike(results[first], results[second])
    ]
    family = {(*pair, name): one for pair in pairs for name, one in compared(*pair).items()}
    adjusted = corrected(family)
    improved = {
        (first, second): improvements(results[first], results[second], compared.rewards)
        for first, second in pairs
    }
    return [
        RowComparison(
            first=first,
            second=second,
            reward=name,
            question=question,
            **vars(one),
            p_holm=adjusted[first, second, name],
            family=len(family),
            improvement=Number(**vars(improved[first, second][name])),
            verdict=_verdict(one, adjusted[first, second, name]),
        )
        for (first, second, name), one in family.items()
    ]


def _verdict(found: Comparison, p_holm: float) -> str:
    """One of :data:`VERDICTS`."""
    if not found.p_value < ALPHA:
        return NOT_SIGNIFICANT
    direction = "higher" if found.difference > 0 else "lower"
    return direction if p_holm < ALPHA else f"{direction} before correction only"


def _published(
    spec: TableSpec, paper: PaperTables, pair: tuple[RowSpec, RowSpec], column: PaperColumn | None
) -> float | None:
    """The paper's difference, if it has one."""
    table, (first, second) = spec.paper_table, pair
    if table is None or first.paper is None or second.paper is None or column is None:
        return None
    ours, theirs = paper.row(table, first.paper), paper.row(table, second.paper)
    return round(ours.scores[column] - theirs.scores[column], DIGITS)


def _cost_ratios(first: Row, second: Row) -> dict[CostColumn, float]:
    """Training cost of the first divided by the second's."""
    costs = [source.cost for row in (first, second) for source in row.sources]
    devices = {cost.device for cost in costs if cost is not None}
    ours, theirs = first.every_cost, second.every_cost
    return {
        name: ours[name] / theirs[name]
        for name in COMPARED_COSTS
        # Seconds on different devices do not compare.
        if ours and theirs.get(name) and (name != "device_seconds" or len(devices) == 1)
    }
