"""A table's summary: which differences are significant, which are not, and at what cost."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import get_args

from benchmarks.evaluation.power import POWER
from benchmarks.evaluation.statistics import (
    ALPHA,
    MIN_SEEDS,
    NOTHING,
    nonzero,
    p_equation,
    p_text,
    signed,
)
from reproduce.tables.headroom import MARGIN
from reproduce.tables.markdown import markdown_escape, markdown_table
from reproduce.tables.model import (
    COST_LABELS,
    IN_DOMAIN,
    NOT_SIGNIFICANT,
    VERDICTS,
    PaperVerdict,
    RowComparison,
    Table,
)
from reproduce.tables.paper import DIGITS
from reproduce.tables.planned import order_notes

_PRIMARY = (
    "Declared in the experiment's file; all other comparisons are secondary. p (Holm) is corrected "
    "over the primary comparisons of a group. Detectable is the true difference that is found with "
    f"probability {POWER:.0%} after that correction, given the number of seeds and their spread. "
    f"Equivalent: the interval lies within {MARGIN:.0%} of the headroom."
)


def summary_markdown(table: Table) -> str:
    """One section per group, with a table of differences and a sentence per pair of rows.

    How the directions agree with the paper's comes last.
    """
    found = table.comparisons
    title = f"### {markdown_escape(table.title)}: summary (profile `{table.profile}`)"
    if not found:
        return f"{title}\n\nNothing to compare yet: no pair of rows has results.\n"
    primary, secondary = table.asked("primary"), table.asked("rows", "baseline")
    parts = [title, _method_sentences(found)]
    if primary:
        parts += ["**Primary comparisons**", _PRIMARY, _difference_table(table, primary)]
        parts.append("\n".join(f"- {markdown_escape(note)}" for note in order_notes(table)))
    for group in dict.fromkeys(table.row(one.first).group for one in secondary):
        members = [one for one in secondary if table.row(one.first).group == group]
        heading = f"{table.group_label}: {group}" if group else table.row_label
        heading += " (secondary comparisons)" if primary else ""
        parts += [f"**{markdown_escape(heading)}**", _difference_table(table, members)]
        sentences = [
            markdown_escape(pair_sentence(table, pair) + _cost_sentence(pair[0]))
            for pair in pairs(members)
        ]
        parts.append("\n".join(f"- {sentence}" for sentence in sentences))
    parts.append(_paper_sentences(table))
    return "\n\n".join(part for part in parts if part) + "\n"


def pairs(found: Iterable[RowComparison]) -> list[list[RowComparison]]:
    """The comparisons of each pair of rows."""
    return [list(members) for _, members in groupby(found, lambda one: (one.first, one.second))]


def pair_sentence(table: Table, pair: Sequence[RowComparison]) -> str:
    """One sentence about a pair of rows, over all score columns."""
    parts = []
    for verdict in VERDICTS:
        names = [table.column(one.reward).label for one in pair if one.verdict == verdict]
        if verdict == NOT_SIGNIFICANT and len(names) == len(pair) > 1:
            parts.append("no significant difference on any score")
        elif names:
            *others, last = names
            listed = f"{', '.join(others)} and {last}" if others else last
            parts.append(f"{verdict} on {listed}")
    first, second = (table.row(key).label for key in (pair[0].first, pair[0].second))
    return f"{first} vs. {second} ({pair[0].about}): {'; '.join(parts)}."


def _cost_sentence(one: RowComparison) -> str:
    ratios = [
        f"{COST_LABELS[name].lower()} {ratio:.2f}×" for name, ratio in one.cost_ratios.items()
    ]
    return f" Cost ratio: {', '.join(ratios)}." if ratios else ""


def _method_sentences(found: Sequence[RowComparison]) -> str:
    counts = sorted({one.count for one in found if one.about == "method"})
    sentences = []
    if counts:
        seeds = " or ".join(str(count) for count in counts)
        sentences.append(
            f"`method` differences are seed-level: means over {seeds} shared training seeds on "
            f"these held-out prompts, 95% t interval, paired t-test. {counts[0]} seeds leave "
            f"{counts[0] - 1} degrees of freedom, so real differences can remain undetected."
        )
    if any(one.about == "checkpoint" for one in found):
        sentences.append(
            "`checkpoint` differences are prompt-level: these trained weights on the same prompts, "
            f"paired bootstrap and sign-flip test. Fewer than {MIN_SEEDS} seeds are shared, so "
            "they say nothing about retraining the method."
        )
    sentences.append(
        "p (Holm) is corrected over all rows and scores of a group, separately for the comparisons "
        f"with the baseline. A row is called higher or lower if p (Holm) is below {ALPHA}, and "
        "'before correction only' if only the uncorrected p is. P(higher) is the probability that "
        "the row scores higher on a prompt; ties count half."
    )
    return " ".join(sentences)


def _difference_table(table: Table, members: Sequence[RowComparison]) -> str:
    heads = ["Row", "Versus", "Score", "Difference", "95% interval", "p", "p (Holm)"]
    heads += ["P(higher)", "Label", "Verdict"]
    primary = members[0].question == "primary"
    heads += ["Detectable"] if primary else []
    with_paper = any(one.published_difference is not None for one in members)
    heads += ["Paper's difference"] if with_paper else []
    lines = []
    for one in members:
        first, column = table.row(one.first), table.column(one.reward)
        low, high = signed(one.low, column.digits), signed(one.high, column.digits)
        texts = [
            first.full_label if primary else first.label,
            table.row(one.second).label,
            column.label + (IN_DOMAIN if column.name in first.trained_on else ""),
            signed(one.difference, column.digits),
            f"{low} to {high}",
            p_text(one.p_value),
            p_text(one.p_holm),
            f"{one.improvement.text} {one.improvement.ends}",
            one.about,
            one.verdict + ("; equivalent" if one.equivalent else ""),
            *([_detectable(table, one)] if primary else []),
            *([_paper_difference(table, one)] if with_paper else []),
        ]
        lines.append([markdown_escape(text) for text in texts])
    return markdown_table([(head, "---") for head in heads], lines)


def _detectable(table: Table, one: RowComparison) -> str:
    if one.detectable is None:
        return NOTHING
    return nonzero(one.detectable, table.column(one.reward).digits)


def _paper_difference(table: Table, one: RowComparison) -> str:
    """The paper's difference with the name of its column, or a dash."""
    if one.published_difference is None:
        return NOTHING
    return f"{signed(one.published_difference, DIGITS)} ({table.column(one.reward).paper})"


def _paper_sentences(table: Table) -> str:
    known: dict[str, list[RowComparison]] = {name: [] for name in get_args(PaperVerdict)}
    for one in table.comparisons:
        if one.paper_verdict is not None:
            known[one.paper_verdict].append(one)
    total = sum(map(len, known.values()))
    if not total:
        return ""
    other_model = "" if table.same_model else " (for another model, so directions only)"
    summary = (
        f"The paper reports {total} of these differences{other_model}: "
        f"{len(known['confirmed'])} are confirmed (significant), "
        f"{len(known['same direction'])} have the same direction, "
        f"{len(known['opposite direction'])} have the opposite direction and "
        f"{len(known['contradicted'])} are contradicted (significant)."
    )
    lines = [summary]
    for verdict in ("contradicted", "opposite direction"):
        if known[verdict]:
            lines.append(f"\n{verdict.capitalize()}:\n")
            lines += [f"- {markdown_escape(_contrast(table, one))}" for one in known[verdict]]
    return "\n".join(lines)


def _contrast(table: Table, one: RowComparison) -> str:
    first, column = table.row(one.first), table.column(one.reward)
    where = f" ({first.group})" if first.group else ""
    return (
        f"{first.label} vs. {table.row(one.second).label}{where}, {column.label}: "
        f"here {signed(one.difference, column.digits)} ({p_equation(one.p_holm)} after Holm), "
        f"paper {_paper_difference(table, one)}."
    )
