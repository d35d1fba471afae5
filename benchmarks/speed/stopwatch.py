"""Seconds per phase, numbers of function evaluations, and the peak speed of the device."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

CEILING_SIDE = {"cuda": 8192, "cpu": 2048}
CEILING_REPEATS = 5


class Stopwatch:
    """Sums the seconds of non-overlapping phases; on the CPU, those that the process computes.

    Attributes:
        device: synchronized at both ends of a phase.
        seconds: seconds by phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def now(self) -> float:
        """The time after all work of the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()  # whatever else runs on the machine

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block."""
        started = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - started


class TimedReward:
    """A reward model whose scoring is timed as a phase."""

    def __init__(self, model: Any, watch: Stopwatch) -> None:
        self._model, self._watch = model, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def score(self, images: Any, prompts: Any) -> torch.Tensor:
        """See :meth:`g2rpo.rewards.base.RewardModel.score`."""
        with self._watch.phase("reward"):
            scores: torch.Tensor = self._model.score(images, prompts)
        return scores


@contextmanager
def counted_evaluations(transformer: nn.Module) -> Iterator[Counter[str]]:
    """Counts the latents passed through ``transformer``, with and without gradients."""
    counts: Counter[str] = Counter()

    def count(module: nn.Module, positional: Any, named: dict[str, Any], output: Any) -> None:
        del module, positional, output
        kind = "training" if torch.is_grad_enabled() else "rollout"
        counts[kind] += len(named["hidden_states"])

    handle = transformer.register_forward_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def matmul_ceiling(device: torch.device) -> float:
    """Best TFLOP/s of a large square matrix product: bfloat16 on a GPU, float32 on the CPU."""
    side = CEILING_SIDE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    watch, best = Stopwatch(device), float("inf")
    matrix @ matrix
    for _ in range(CEILING_REPEATS):
        started = watch.now()
        matrix @ matrix
        best = min(best, watch.now() - started)
    return 2 * side**3 / best / 1e12
