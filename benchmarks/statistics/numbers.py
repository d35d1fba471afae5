"""How numbers are printed, so that rounding never contradicts what is said of them."""

import math

from benchmarks.statistics.records import ALPHA

_MORE_DECIMALS = 5


def fixed(number: float, digits: int) -> str:
    """A number with ``digits`` decimals, and no minus sign before a zero."""
    text = f"{number:.{digits}f}"
    return text.removeprefix("-") if not text.strip("-0.") else text


def beside(number: float, digits: int, bound: float) -> str:
    """A number with ``digits`` decimals, or more where rounding moves it onto or across ``bound``.

    So what is above one half, or below a threshold, is printed as such.
    """
    side = _side(number, bound)
    texts = (fixed(number, decimals) for decimals in range(digits, digits + _MORE_DECIMALS))
    kept = (text for text in texts if _side(float(text), bound) == side)
    return next(kept, repr(float(number)))


def _side(number: float, bound: float) -> int:
    return (number > bound) - (number < bound)


def nonzero(number: float, digits: int) -> str:
    """A number with ``digits`` decimals, or one figure of it where these would all be zero."""
    text = fixed(number, digits)
    return f"{number:.1g}" if number and not text.strip("0.") else text


def signed(difference: float, digits: int) -> str:
    """A difference, or an end of its interval, with its sign; only zero is printed as zero."""
    text = nonzero(difference, digits)
    return f"+{text}" if difference > 0 else text


def p_text(p_value: float) -> str:
    """A p-value with three decimals, or more where it would change sides of :data:`ALPHA`.

    ``< 0.001`` below that, and a dash where there is none (NaN).
    """
    if math.isnan(p_value):
        return "–"
    return "< 0.001" if p_value < 0.001 else beside(p_value, 3, ALPHA)


def p_equation(p_value: float) -> str:
    """``p = 0.012`` or ``p < 0.001``, see :func:`p_text`."""
    text = p_text(p_value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"
