"""How numbers are printed, so that rounding never contradicts what is said of them."""

import math

from benchmarks.evaluation.statistics.records import ALPHA

NOTHING = "–"
"""In the place of a number that there is not."""
_UNITS = ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"))


def human(number: float | None) -> str:
    """A count or a number of seconds in a few characters: 9,876; 17.1k; 1.71M."""
    if number is None:
        return NOTHING
    if 0 < number < 0.01:
        return "<0.01"
    if number < 10_000:
        return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"
    scaled = [(float(f"{number / unit:.3g}"), suffix) for unit, suffix in _UNITS]
    # What rounds up to 1000 of a unit is shown in the next one.
    figure, suffix = next((pair for pair in scaled if pair[0] < 1000), scaled[-1])
    return f"{figure:g}{suffix}"


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
        return NOTHING
    if p_value < 0.001:
        return "< 0.001"
    text = f"{p_value:.3f}"
    return f"< {ALPHA}" if p_value < ALPHA <= float(text) else text


def p_equation(p_value: float) -> str:
    """``p = 0.012`` or ``p < 0.001``, see :func:`p_text`."""
    text = p_text(p_value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"
