"""Batch sizes that are halved when memory runs out."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from g2rpo.errors import UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class BatchSize:
    """A batch size that is halved when memory runs out.

    Results depend on it only by the rounding of floating-point sums.

    Attributes:
        states: the current batch size, at least 1.
        reduced: whether it is smaller than at first.
    """

    def __init__(
        self, states: int, what: str = "rollout", hint: str = "", unit: str = "state"
    ) -> None:
        """Starts with ``states``, at least 1.

        Messages name the work (``what``) and its ``unit``; ``hint`` is what to do if even one does
        not fit.
        """
        self.states, self.what, self.hint, self.unit = states, what, hint, unit
        self.reduced = False

    def run(self, compute: Callable[[int], Result]) -> Result:
        """``compute(states)``; if memory runs out, again with half as many.

        Raises:
            UserError: a size of 1 does not fit.
        """
        while True:
            try:
                return compute(self.states)
            except torch.OutOfMemoryError:
                pass
            # Outside the handler, which keeps the failed call's tensors alive.
            self.halve()

    def halve(self, *, warn: bool = True) -> None:
        """Halves the size after running out of memory, with a warning.

        Raises:
            UserError: the size is already 1.
        """
        if self.states == 1:
            hint = f"; {self.hint}" if self.hint else ""
            raise UserError(f"out of memory in {self.what} with one {self.unit} at a time{hint}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller = self.states // 2
        if warn:
            text = "out of memory in %s: retrying with %d %ss at a time instead of %d"
            logger.warning(text, self.what, smaller, self.unit, self.states)
        self.lower(smaller)

    def lower(self, states: int | None) -> None:
        """Adopts a smaller size, e.g. another rank's; ignores None and larger ones."""
        if states is not None and states < self.states:
            self.states, self.reduced = states, True
