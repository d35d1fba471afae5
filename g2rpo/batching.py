"""How many states go through a model at once: fewer, where memory turns out to be too small."""

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

    What is computed does not depend on it but for the rounding of floating-point sums.

    Attributes:
        states: how many go through at once.
        reduced: whether memory has run out, so that it is not what it began with.
    """

    def __init__(self, states: int, what: str = "rollout", hint: str = "") -> None:
        """Begins with ``states``.

        Args:
            states: at least 1.
            what: whose size it is, for messages.
            hint: what to do where a single state does not fit.
        """
        self.states, self.what, self.hint = states, what, hint
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
            self.exhausted()

    def exhausted(self) -> None:
        """Halves the size after memory has run out, and says so.

        Raises:
            UserError: it is 1 already.
        """
        if self.states == 1:
            hint = f"; {self.hint}" if self.hint else ""
            raise UserError(f"out of memory in {self.what} with one state at a time{hint}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller = self.states // 2
        logger.warning(
            "out of memory: %s goes on with %d states at a time, not %d",
            self.what, smaller, self.states,
        )  # fmt: skip
        self.lower(smaller)

    def lower(self, states: int) -> None:
        """Takes a smaller size over, e.g. another rank's; a larger one changes nothing."""
        if states < self.states:
            self.states, self.reduced = states, True


def as_batch_size(size: "int | BatchSize") -> BatchSize:
    """``size`` itself, or a new one that begins with that many states."""
    return size if isinstance(size, BatchSize) else BatchSize(size)
