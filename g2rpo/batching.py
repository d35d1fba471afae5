"""How many inputs go through a model at once: half as many where memory turns out too small."""

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

    Results do not depend on it, except for the rounding of floating-point sums.

    Attributes:
        states: how many go through at once, at least 1.
        reduced: whether it is smaller than it was at first.
    """

    def __init__(
        self, states: int, what: str = "rollout", hint: str = "", unit: str = "state"
    ) -> None:
        """Starts with ``states``.

        Args:
            states: at least 1.
            what: runs out of memory, for messages.
            hint: what to do where 1 is too many.
            unit: what is counted, for messages.
        """
        self.states, self.what, self.hint, self.unit = states, what, hint, unit
        self.reduced = False

    def run(self, compute: Callable[[int], Result]) -> Result:
        """``compute(states)``; where memory runs out, again from its start with half as many.

        Raises:
            UserError: a single state does not fit.
        """
        while True:
            try:
                return compute(self.states)
            except torch.OutOfMemoryError:
                pass
            # Outside of the handler, which would keep the failed call's tensors alive.
            self.halve()

    def halve(self, *, warn: bool = True) -> None:
        """Halves the size after memory has run out, and says so in a warning.

        Raises:
            UserError: it is 1 already.
        """
        if self.states == 1:
            hint = f"; {self.hint}" if self.hint else ""
            raise UserError(f"out of memory in {self.what} with one {self.unit} at a time{hint}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller = self.states // 2
        if warn:
            text = "out of memory: %s continues with %d %ss at a time, not %d"
            logger.warning(text, self.what, smaller, self.unit, self.states)
        self.lower(smaller)

    def lower(self, states: int | None) -> None:
        """Takes over a smaller size, e.g. another rank's; None or a larger one changes nothing."""
        if states is not None and states < self.states:
            self.states, self.reduced = states, True
