"""A plain summary of a table: which differences hold, which do not, and at what cost."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from benchmarks.evaluation.statistics import (
    ALPHA,
    MIN_SEEDS,
    NOTHING,
    Label,
    nonzero,
    p_equation,
    p_text,
    signed,
)
from reproduce.tables.labels import COST_LABELS
from reproduce.tables.markdown import markdown_escape, markdown_table
from reproduce.tables.model import IN_DOMAIN, UNCLEAR, VERDICTS, PaperVerdict, RowComparison, Table
from reproduce.tables.paper import DIGITS


def summary_markdown(table: Table) -> str:
    """One section a group with a table of differences and a sentence for each pair.

    After them, how the directions relate to the paper's, and every comparison in words.
    """
    found = table.comparisons
    title = f"### {markdown_escape(table.title)}: what holds (profile `{table.profile}`)"
    if not found:
        return f"{title}\n\nNothing to compare yet: no pair of rows has results.\n"
    parts = [title, _method_sentences(found)]
    for group in dict.fromkeys(table.row(one.first).group for one in found):
        members = [one for one in found if table.row(one.first).group == group]
        heading = f"{table.group_label}: {group}" if group else table.row_label
        parts += [f"**{markdown_escape(heading)}**", _difference_table(table, members)]
        sentences = [
            markdown_escape(pair_sentence(table, pair) + _cost_sentence(pair[0]))
            for pair in pairs(members)
        ]
        parts.append("\n".join(f"- {sentence}" for sentence in sentences))
    parts += [_paper_sentences(table), _in_words(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def pairs(found: Iterable[RowComparison]) -> list[list[RowComparison]]:
    """The comparisons of each pair of rows."""
    return [list(members) for _, members in groupby(found, lambda one: (one.first, one.second))]


def pair_sentence(table: Table, pair: Sequence[RowComparison]) -> str:
    """One sentence on a pair of rows over all score columns."""
    parts = []
    for verdict in VERDICTS:
        names = [table.column(one.reward).label for one in pair if one.verdict == verdict]
        if verdict == UNCLEAR and len(names) == len(pair) > 1:
            parts.append(f"{UNCLEAR} on any score")
        elif names:
            parts.append(f"{verdict} on {_listed(names)}")
    first, second = (table.row(key).label for key in (pair[0].first, pair[0].second))
    return f"{first} against {second} ({pair[0].about}): {'; '.join(parts)}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _cost_sentence(one: RowComparison) -> str:
    ratios = [
        f"{COST_LABELS[name].lower()} {ratio:.2f}×" for name, ratio in one.cost_ratios.items()
    ]
    return f" Cost against it: {', '.join(ratios)}." if ratios else ""


def _method_sentences(found: Sequence[RowComparison]) -> str:
    counts = sorted({one.count for one in found if one.about == "method"})
    sentences = []
    if counts:
        seeds = " or ".join(str(count) for count in counts)
        sentences.append(
            f"Differences labelled method: means over {seeds} shared training seeds, 95% t "
            f"interval, paired t-test. With {counts[0]} seeds it has {counts[0] - 1} degrees of "
            "freedom: what it does not find may still be there. They are about these held-out "
            "prompts."
        )
    if any(one.about == "checkpoint" for one in found):
        sentences.append(
            "Differences labelled checkpoint: these trained weights on the same prompts, paired "
            f"bootstrap and sign-flip test; fewer than {MIN_SEEDS} seeds are shared, so they say "
            "nothing about training the method again."
        )
    sentences.append(
        "p (Holm) is corrected over all rows and scores of a group, the comparisons with the "
        f"baseline apart; rows are called above or below where it is under {ALPHA}, and 'before "
        "correction only' where just the single comparison's p is."
    )
    return " ".join(sentences)


def _difference_table(table: Table, members: Sequence[RowComparison]) -> str:
    heads = ["Row", "Against", "Score", "Difference", "95% interval", "p", "p (Holm)", "Label"]
    heads.append("Verdict")
    with_paper = any(one.published_difference is not None for one in members)
    heads += ["Paper's difference"] if with_paper else []
    lines = []
    for one in members:
        first, column = table.row(one.first), table.column(one.reward)
        low, high = signed(one.low, column.digits), signed(one.high, column.digits)
        texts = [
            first.label,
            table.row(one.second).label,
            column.label + (IN_DOMAIN if column.name in first.trained_on else ""),
            signed(one.difference, column.digits),
            f"{low} to {high}",
            p_text(one.p_value),
            p_text(one.p_holm),
            one.about,
            one.verdict,
            *([_paper_difference(table, one)] if with_paper else []),
        ]
        lines.append([markdown_escape(text) for text in texts])
    return markdown_table([(head, "---") for head in heads], lines)


def _paper_difference(table: Table, one: RowComparison) -> str:
    """The paper's difference with the name of its column, or a dash."""
    if one.published_difference is None:
        return NOTHING
    return f"{signed(one.published_difference, DIGITS)} ({table.column(one.reward).paper})"


def _paper_sentences(table: Table) -> str:
    known: dict[PaperVerdict, list[RowComparison]] = {
        "confirmed": [],
        "same direction": [],
        "opposite direction": [],
        "contradicted": [],
    }
    for one in table.comparisons:
        if one.paper_verdict is not None:
            known[one.paper_verdict].append(one)
    counts = {verdict: len(members) for verdict, members in known.items()}
    if not any(counts.values()):
        return ""
    other_model = "" if table.same_model else " (of another model: directions only)"
    summary = (
        f"Of the {sum(counts.values())} differences whose direction the paper reports"
        f"{other_model}, {counts['confirmed']} are confirmed with significance, "
        f"{counts['same direction']} point the same way without it, "
        f"{counts['opposite direction']} point the other way without it and "
        f"{counts['contradicted']} are contradicted with significance."
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
        f"{first.label} against {table.row(one.second).label}{where}, {column.label}: "
        f"here {signed(one.difference, column.digits)} ({p_equation(one.p_holm)} after Holm), "
        f"paper {_paper_difference(table, one)}."
    )


def _in_words(table: Table) -> str:
    """Every comparison in plain sentences, folded away."""
    lines = []
    for one in table.comparisons:
        group = table.row(one.first).group
        words = f"{_difference_sentence(table, one)} {_improvement_sentence(table, one)}"
        lines.append(f"- {markdown_escape((f'{group}: ' if group else '') + words)}")
    inner = "\n".join(lines)
    return f"<details><summary>Every comparison in words</summary>\n\n{inner}\n\n</details>"


def _difference_sentence(table: Table, one: RowComparison) -> str:
    """Says which of the two scores higher, or that this is not settled.

    A difference that is not significant is never called none: that cannot be shown by a test of
    differences. Only the corrected p-value decides.
    """
    first, second, column = table.row(one.first), table.row(one.second), table.column(one.reward)
    size = nonzero(abs(one.difference) if one.significant else one.difference, column.digits)
    ends = one.low, one.high
    if one.significant and one.difference < 0:
        ends = -one.high, -one.low
    p_value = p_equation(one.p_holm)
    if one.family > 1:
        p_value += f" after Holm's correction over {one.family} comparisons"
        if one.p_value < ALPHA <= one.p_holm:
            p_value += f", {p_equation(one.p_value)} before it"
    low, high = (nonzero(end, column.digits) for end in ends)
    evidence = f"{_over(one.level, low, high, one.about, one.count)}; {p_value}"
    if not one.significant:
        return (
            f"Whether {first.label} scores higher or lower than {second.label} on {column.label} "
            f"is not settled: the difference measured is {size} ({evidence})."
        )
    direction = "higher" if one.difference > 0 else "lower"
    return (
        f"{first.label} scores {size} {direction} than {second.label} on {column.label} "
        f"({evidence})."
    )


def _improvement_sentence(table: Table, one: RowComparison) -> str:
    """Says how often the first scores higher, with the interval and what it is over."""
    first, second, column = table.row(one.first), table.row(one.second), table.column(one.reward)
    i = one.improvement
    over = _over(one.level, f"{i.low:.3f}", f"{i.high:.3f}", one.about, one.count)
    return (
        f"On a prompt, {first.label} scores higher than {second.label} on {column.label} with "
        f"probability {i.mean:.3f} ({over}; ties count half)."
    )


def _over(level: float, low: str, high: str, about: Label, count: int) -> str:
    units = "training seeds" if about == "method" else "prompts of these checkpoints"
    return f"{100 * level:.6g} % interval {low} to {high} over {count} {units}"
