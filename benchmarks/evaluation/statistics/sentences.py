"""One plain sentence for a comparison: what was measured, over what, and how sure it is."""

from benchmarks.evaluation.statistics.numbers import nonzero, p_equation
from benchmarks.evaluation.statistics.records import ALPHA, CorrectedComparison, Label


def comparison_sentence(found: CorrectedComparison, *, digits: int = 4) -> str:
    """Says which of the two scores higher, or that this is not settled.

    A difference that is not significant is never called none: that cannot be shown by a test of
    differences. Only the corrected p-value decides.

    Args:
        found: one comparison of a family.
        digits: decimals of the scores.

    Returns:
        One sentence, e.g. "G2RPO scores 0.0058 higher than the base on HPS (95 % interval 0.0041
        to 0.0075 over 400 prompts of these checkpoints; p < 0.001 after Holm's correction over 12
        comparisons)."
    """
    c = found.comparison
    if not found.significant:
        return (
            f"Whether {found.first} scores higher or lower than {found.second} on {found.reward} "
            f"is not settled: the difference measured is {nonzero(c.difference, digits)} "
            f"({_evidence(found, c.low, c.high, digits)})."
        )
    direction, low, high = "higher", c.low, c.high
    if c.difference < 0:
        direction, low, high = "lower", -c.high, -c.low
    return (
        f"{found.first} scores {nonzero(abs(c.difference), digits)} {direction} than "
        f"{found.second} on {found.reward} ({_evidence(found, low, high, digits)})."
    )


def improvement_sentence(found: CorrectedComparison) -> str:
    """Says how often the first scores higher, with the interval and what it is over.

    Raises:
        ValueError: the comparison was made without the probability of improvement.
    """
    if found.improvement is None:
        raise ValueError(f"{found.first} against {found.second}: no probability of improvement")
    i = found.improvement
    return (
        f"On a prompt, {found.first} scores higher than {found.second} on {found.reward} with "
        f"probability {i.mean:.3f} ({_percent(i.level)} interval {i.low:.3f} to {i.high:.3f} over "
        f"{_units(i.label, i.count)}; ties count half)."
    )


def _evidence(found: CorrectedComparison, low: float, high: float, digits: int) -> str:
    c = found.comparison
    p_text = p_equation(found.adjusted)
    if found.family > 1:
        p_text += f" after Holm's correction over {found.family} comparisons"
        if c.p_value < ALPHA <= found.adjusted:
            p_text += f", {p_equation(c.p_value)} before it"
    return (
        f"{_percent(c.level)} interval {nonzero(low, digits)} to {nonzero(high, digits)} over "
        f"{_units(c.label, c.count)}; {p_text}"
    )


def _units(label: Label, count: int) -> str:
    if label == "method":
        return f"{count} training seeds"
    return f"{count} prompts of these checkpoints"


def _percent(level: float) -> str:
    return f"{100 * level:.6g} %"
