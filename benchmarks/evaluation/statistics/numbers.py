"""How numbers are printed, so that rounding never contradicts what is said of them."""

import math

from benchmarks.evaluation.statistics.records import ALPHA


def fixed(number: float, digits: int) -> str:
    """A number with ``digits`` decimals, and no minus sign before a zero."""
    text = f"{number:.{digits}f}"
    return text.removeprefix("-") if not text.strip("-0.") else text


def nonzero(number: float, digits: int) -> str:
    """A number with ``digits`` decimals, or one figure of it where these would all be zero."""
    text = fixed(number, digits)
    return f"{number:.1g}" if number and not text.strip("0.") else text


def signed(difference: float, digits: int) -> str:
    """A difference, or an end of its interval, with its sign; only zero is printed as zero."""
    text = nonzero(difference, digits)
    return f"+{text}" if difference > 0 else text


def p_text(p_value: float) -> str:
    """A p-value with three decimals, ``< 0.001`` below that, and a dash where there is none (NaN).

    What is below :data:`ALPHA` but would round up to it is ``< 0.05``: 0.050 is not significant.
    """
    if math.isnan(p_value):
        return "–"
    if p_value < 0.001:
        return "< 0.001"
    text = f"{p_value:.3f}"
    return f"< {ALPHA}" if p_value < ALPHA <= float(text) else text


def p_equation(p_value: float) -> str:
    """``p = 0.012`` or ``p < 0.001``, see :func:`p_text`."""
    text = p_text(p_value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"
