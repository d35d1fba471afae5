"""Intervals and paired comparisons for tables of scores.

Two questions are kept apart by a label that every number carries:

``checkpoint``
    How well do *these trained weights* do on prompts like the held-out ones? The prompts are the
    sample: bootstrap over prompts; paired differences with a sign-flip permutation test.
``method``
    How well does *the method* do on these prompts when it is trained again? The seeds are the
    sample: Student's t on the seed means; paired differences with the paired t-test. Needs three
    seeds.

A checkpoint interval says nothing about another training seed, a method interval nothing about
other prompts, so neither is ever shown as the other. The functions take matrices whose rows are
independent quantities (reward columns, say) measured on the same prompts or seeds, and draw one
set of resamples for all of them. ``docs/statistics.md`` has the definitions, the simulated
coverage and the sources.
"""

from benchmarks.evaluation.statistics.bootstrap import bootstrap_ends, bootstrap_means
from benchmarks.evaluation.statistics.comparisons import (
    checkpoint_comparisons,
    corrected,
    holm,
    method_comparisons,
    sign_flip_p_values,
)
from benchmarks.evaluation.statistics.improvement import (
    checkpoint_improvements,
    method_improvements,
    share_intervals,
    wins,
)
from benchmarks.evaluation.statistics.inputs import FloatArray
from benchmarks.evaluation.statistics.intervals import (
    checkpoint_intervals,
    method_intervals,
    row_intervals,
)
from benchmarks.evaluation.statistics.numbers import (
    NOTHING,
    fixed,
    human,
    nonzero,
    p_equation,
    p_text,
    signed,
)
from benchmarks.evaluation.statistics.records import (
    ALPHA,
    LEVEL,
    MIN_SEEDS,
    RESAMPLES,
    Comparison,
    Interval,
    Label,
)

__all__ = [
    "ALPHA",
    "LEVEL",
    "MIN_SEEDS",
    "NOTHING",
    "RESAMPLES",
    "Comparison",
    "FloatArray",
    "Interval",
    "Label",
    "bootstrap_ends",
    "bootstrap_means",
    "checkpoint_comparisons",
    "checkpoint_improvements",
    "checkpoint_intervals",
    "corrected",
    "fixed",
    "holm",
    "human",
    "method_comparisons",
    "method_improvements",
    "method_intervals",
    "nonzero",
    "p_equation",
    "p_text",
    "row_intervals",
    "share_intervals",
    "sign_flip_p_values",
    "signed",
    "wins",
]
