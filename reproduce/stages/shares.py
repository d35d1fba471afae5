"""A share of a stage's prompts: the work of one job of an array."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Element = TypeVar("Element")


@dataclass(frozen=True)
class Share:
    """Every ``count``-th prompt starting at ``index``; by default all prompts.

    Raises:
        ValueError: ``index`` is not one of 0..count-1.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"share {self.index} of {self.count}: count from 0")

    def of(self, whole: Sequence[Element]) -> Sequence[Element]:
        """This share's elements of ``whole``, in order."""
        return whole[self.index :: self.count]

    @property
    def first(self) -> bool:
        """Whether this share also does the work that is done once per cell."""
        return self.index == 0

    def __str__(self) -> str:
        return f"{self.index:03d}-of-{self.count:03d}"


WHOLE = Share()
