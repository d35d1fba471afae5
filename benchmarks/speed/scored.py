"""What the benchmark needs of each reward model: random weights, and its package's scoring."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.evaluation.scoring.items import Item

PROMPT = "two small red circles above a blue star on gray, {}"
"""The images' prompts; the number is 0 to 3."""

PackageScore = Callable[[Sequence[Item]], list[float]]


@dataclass(frozen=True)
class Scored:
    """A reward model with random weights, and its package.

    Attributes:
        beside: the package, or the code, that it is compared with.
        write: saves weights to a folder, with width and layers divided by a number.
        package: loads them from the folder to a device in the package's own way.
        billions: whether the published size has billions of parameters.
        options: further settings of our reward, by type of device.
        questions: the file in the folder with the prompts' questions, for Soft-TIFA.
    """

    beside: str
    write: Callable[[Path, int], None]
    package: Callable[[Path, torch.device], AbstractContextManager[PackageScore]]
    billions: bool = False
    options: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    questions: str | None = None


def share(count: int, divisor: int) -> int:
    """``count`` heads or layers divided by ``divisor``, at least one."""
    return max(1, count // divisor)


def one_by_one(score: Callable[[Path, str], float]) -> PackageScore:
    """Scores items with a function of one image file and its prompt."""
    return lambda items: [score(item.image, item.prompt) for item in items]
