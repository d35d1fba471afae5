"""A plain reading of a table: which differences hold, which do not, and at what cost."""

from collections.abc import Sequence

from benchmarks.evaluation.results import Cell, RowScores
from benchmarks.evaluation.statistics import ALPHA, MIN_SEEDS, p_equation, p_text, signed
from reproduce.tables.findings import UNCLEAR, VERDICTS, Finding, findings
from reproduce.tables.formats import IN_DOMAIN, NOTHING, markdown_escape
from reproduce.tables.paper import DIGITS
from reproduce.tables.spec import COST_LABELS, CostColumn, TableSpec
from reproduce.tables.values import row_costs, select_rows


def write_reading(
    spec: TableSpec, cells: Sequence[Cell], *, profile: str, heading: str | None = None
) -> str:
    """The reading of a table as Markdown.

    Args:
        spec: the table, with ``focus`` rows.
        cells: its finished cells.
        profile: the profile the cells were measured under.
        heading: replaces the table's title, e.g. to tell equal iterations from equal cost.

    Returns:
        One section a group with a table of differences and a sentence for each pair, then how the
        directions relate to the paper's.
    """
    found = findings(spec, cells, profile=profile)
    results = select_rows(spec, cells)
    parts = [f"### {markdown_escape(heading or spec.title)}: what holds (profile `{profile}`)"]
    if not found:
        return parts[0] + "\n\nNothing to compare yet: no pair of rows has results.\n"
    parts.append(_method_sentences(found))
    for group in dict.fromkeys(finding.group for finding in found):
        members = [finding for finding in found if finding.group == group]
        title = f"{spec.group_label}: {group}" if group else spec.row_label
        parts.append(f"**{markdown_escape(title)}**")
        parts.append(_difference_table(members))
        pairs = dict.fromkeys((finding.focus.key, finding.other.key) for finding in members)
        sentences = []
        for focus, other in pairs:
            pair = [f for f in members if (f.focus.key, f.other.key) == (focus, other)]
            costs = _cost_sentence(results[focus], results[other])
            sentences.append(f"- {markdown_escape(pair_sentence(pair) + costs)}")
        parts.append("\n".join(sentences))
    parts.append(_paper_sentences(spec, found, profile))
    parts.append(_in_words(found))
    return "\n\n".join(part for part in parts if part) + "\n"


def _in_words(found: Sequence[Finding]) -> str:
    """Every comparison in plain sentences, folded away."""
    lines = "\n".join(
        f"- {markdown_escape((f'{f.group}: ' if f.group else '') + f.sentences)}" for f in found
    )
    return f"<details><summary>Every comparison in words</summary>\n\n{lines}\n\n</details>"


def _method_sentences(found: Sequence[Finding]) -> str:
    counts = sorted({f.comparison.count for f in found if f.comparison.label == "method"})
    sentences = []
    if counts:
        seeds = " or ".join(str(count) for count in counts)
        sentences.append(
            f"Differences labelled method: means over {seeds} shared training seeds, 95% t "
            f"interval, paired t-test. With {counts[0]} seeds it has {counts[0] - 1} degrees of "
            "freedom: what it does not find may still be there. They are about these held-out "
            "prompts."
        )
    if any(f.comparison.label == "checkpoint" for f in found):
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


def _difference_table(members: Sequence[Finding]) -> str:
    head = ("Row", "Against", "Score", "Difference", "95% interval", "p", "p (Holm)")
    with_paper = any(f.published is not None for f in members)
    last = ("Label", "Verdict", *(("Paper's difference",) if with_paper else ()))
    lines = [f"| {' | '.join((*head, *last))} |", "|" + "---|" * (len(head) + len(last))]
    for f in members:
        digits, c = f.column.digits, f.comparison
        texts = [
            f.focus.label,
            f.other.label,
            f.column.label + (IN_DOMAIN if f.column.reward in f.focus.train else ""),
            signed(c.difference, digits),
            f"{signed(c.low, digits)} to {signed(c.high, digits)}",
            p_text(c.p_value),
            p_text(f.adjusted),
            c.label,
            f.verdict,
        ]
        if with_paper:
            texts.append(_paper_difference(f))
        lines.append(f"| {' | '.join(markdown_escape(text) for text in texts)} |")
    return "\n".join(lines)


def _paper_difference(finding: Finding) -> str:
    """The paper's difference with the name of its column, or a dash."""
    if finding.published is None:
        return NOTHING
    return f"{signed(finding.published, DIGITS)} ({finding.column.paper})"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def pair_sentence(pair: Sequence[Finding]) -> str:
    """One sentence on a pair of rows over all score columns."""
    parts = []
    for verdict in VERDICTS:
        names = [f.column.label for f in pair if f.verdict == verdict]
        if verdict == UNCLEAR and len(names) == len(pair) > 1:
            parts.append(f"{UNCLEAR} on any score")
        elif names:
            parts.append(f"{verdict} on {_listed(names)}")
    label = pair[0].comparison.label
    return f"{pair[0].focus.label} against {pair[0].other.label} ({label}): {'; '.join(parts)}."


def _cost_sentence(focus: RowScores, other: RowScores) -> str:
    measures: tuple[CostColumn, ...] = (
        "rollout_evaluations",
        "training_backwards",
        "images_scored",
        "device_seconds",
    )
    costs = [cell.info.cost for row in (focus, other) for cell in row.cells]
    devices = {cost.device for cost in costs if cost is not None}
    pairs = zip(row_costs(focus, measures), row_costs(other, measures), strict=True)
    ratios = [
        f"{COST_LABELS[measure].lower()} {ours / theirs:.2f}×"
        for measure, (ours, theirs) in zip(measures, pairs, strict=True)
        # Seconds on another device are no measure.
        if ours is not None and theirs and (measure != "device_seconds" or len(devices) == 1)
    ]
    return f" Cost against it: {', '.join(ratios)}." if ratios else ""


def _paper_sentences(spec: TableSpec, found: Sequence[Finding], profile: str) -> str:
    known = [f for f in found if f.paper_verdict is not None]
    if not known:
        return ""
    counts = {
        verdict: [f for f in known if f.paper_verdict == verdict]
        for verdict in ("confirmed", "same direction", "opposite direction", "contradicted")
    }
    other_model = "" if profile in spec.paper_profiles else " (of another model: directions only)"
    summary = (
        f"Of the {len(known)} differences whose direction the paper reports{other_model}, "
        f"{len(counts['confirmed'])} are confirmed with significance, "
        f"{len(counts['same direction'])} point the same way without it, "
        f"{len(counts['opposite direction'])} point the other way without it and "
        f"{len(counts['contradicted'])} are contradicted with significance."
    )
    lines = [summary]
    for verdict in ("contradicted", "opposite direction"):
        if counts[verdict]:
            lines.append(f"\n{verdict.capitalize()}:\n")
            lines.extend(f"- {markdown_escape(_contrast(f))}" for f in counts[verdict])
    return "\n".join(lines)


def _contrast(finding: Finding) -> str:
    where = f" ({finding.group})" if finding.group else ""
    ours = signed(finding.comparison.difference, finding.column.digits)
    return (
        f"{finding.focus.label} against {finding.other.label}{where}, {finding.column.label}: "
        f"here {ours} ({p_equation(finding.adjusted)} after Holm), "
        f"paper {_paper_difference(finding)}."
    )
