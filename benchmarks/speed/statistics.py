"""``python -m benchmarks.speed.statistics``: seconds that the statistics of a full table take.

The inputs are drawn from a fixed name: the untrained base and the methods, each scored by every
reward on the same prompts. Everything a table and its reading need at the ``checkpoint`` label is
computed; at the ``method`` label nothing is resampled.
"""

import itertools
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import typer

from benchmarks.evaluation.statistics import (
    RESAMPLES,
    FloatArray,
    checkpoint_comparisons,
    checkpoint_improvements,
    checkpoint_intervals,
    holm,
)
from g2rpo.seeds import generator

BASE = "base"


def made_scores(methods: int, rewards: int, prompts: int) -> dict[str, FloatArray]:
    """Method to [rewards, 1, prompts], the base first; differences of realistic size."""
    rng = generator(0, "statistics-speed", methods, rewards, prompts)
    base = rng.normal(0.3, 0.09, size=(rewards, 1, prompts))
    scores = {BASE: base}
    for place in range(methods):
        noise = rng.normal(0.0, 0.03, size=base.shape)
        scores[f"method{place + 1}"] = base + 0.002 * place + noise
    return scores


def _intervals(scores: dict[str, FloatArray], resamples: int) -> int:
    rows = np.concatenate([cube[:, 0] for cube in scores.values()])
    return len(checkpoint_intervals(rows, resamples=resamples))


def _compared(scores: dict[str, FloatArray], pairs: list[tuple[str, str]], resamples: int) -> int:
    """Comparisons and probabilities of improvement of pairs, corrected as one family."""
    first, second = (
        np.concatenate([scores[name] for name in side]) for side in zip(*pairs, strict=True)
    )
    found = checkpoint_comparisons(first[:, 0], second[:, 0], resamples=resamples)
    checkpoint_improvements(first, second, resamples=resamples)
    return len(holm([one.p_value for one in found]))


def main(
    methods: Annotated[int, typer.Option(min=2, help="Methods besides the base.")] = 5,
    rewards: Annotated[int, typer.Option(min=1)] = 5,
    prompts: Annotated[int, typer.Option(min=2)] = 400,
    resamples: Annotated[int, typer.Option(min=1)] = RESAMPLES,
) -> None:
    """Prints the seconds of each part and their sum."""
    scores = made_scores(methods, rewards, prompts)
    with_base = [(name, BASE) for name in scores if name != BASE]
    every_pair = list(itertools.combinations([name for name in scores if name != BASE], 2))
    parts: dict[str, Callable[[], int]] = {
        "intervals of all rows": lambda: _intervals(scores, resamples),
        "every method against the base, Holm": lambda: _compared(scores, with_base, resamples),
        "every pair of methods, Holm": lambda: _compared(scores, every_pair, resamples),
    }
    typer.echo(
        f"{methods} methods and a base, {rewards} rewards, {prompts} prompts, {resamples} resamples"
    )
    total = 0.0
    for name, part in parts.items():
        start = time.perf_counter()
        count = part()
        seconds = time.perf_counter() - start
        total += seconds
        typer.echo(f"{name:<38}{count:>4} results {seconds:8.3f} s")
    typer.echo(f"{'total':<38}{'':>12} {total:8.3f} s")


if __name__ == "__main__":
    typer.run(main)
