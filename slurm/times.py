"""Reads times in SLURM's formats."""

import re
from typing import Any

_TIME = re.compile(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?( sec| min)?")


def seconds_of(text: str, *, alone: int = 1) -> int | None:
    """A time as SLURM writes it, ``days-hours:minutes:seconds`` or ``30 sec``, in seconds.

    ``M:S`` is minutes and seconds; ``D-H:M`` is days, hours and minutes.

    Args:
        text: the time.
        alone: seconds per unit of a single number.

    Returns:
        None if it is not a time, or is no limit.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        return None
    days, *rest, unit = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is None and len(numbers) == 1:
        return numbers[0] * {" sec": 1, " min": 60}.get(unit, alone)
    if days is None and len(numbers) == 2:
        numbers = [0, *numbers]
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def minutes_of(value: Any) -> Any:
    """A time limit in the formats of sbatch's ``--time``, rounded up to whole minutes.

    Values that are not text are returned unchanged.

    Raises:
        ValueError: not a time.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    seconds = None if " " in text else seconds_of(text, alone=60)
    if seconds is None or any(int(part) > 59 for part in re.findall(r":([0-9]+)", text)):
        raise ValueError(
            "expected minutes, or a time in sbatch's formats: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM "
            "or D-HH:MM:SS"
        )
    return -(-seconds // 60)
