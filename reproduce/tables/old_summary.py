"""Sentences on comparisons, until the report is made from the computed table."""

from collections.abc import Sequence

from reproduce.tables.findings import UNCLEAR, VERDICTS, Finding


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
