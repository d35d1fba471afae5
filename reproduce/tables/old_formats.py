"""Text, Markdown, LaTeX and CSV forms of a computed table."""

from pathlib import Path

from benchmarks.evaluation.metrics import DISTANCE, DRIFT, VENDI
from benchmarks.evaluation.statistics import NOTHING, fixed
from reproduce.tables.model import HACKING_LABEL
from reproduce.tables.spec import METRIC_LABELS
from reproduce.tables.values import Row, Table, Value

TEMPLATES = Path(__file__).parent / "templates"

IN_DOMAIN = "†"


def interval_text(value: Value) -> str | None:
    """``[low, high]`` with the value's decimals, or None where there is no interval."""
    if value.interval is None:
        return None
    ends = (fixed(end, value.digits) for end in (value.interval.low, value.interval.high))
    return f"[{', '.join(ends)}]"


def seeds_text(row: Row) -> str:
    """How many seeds, or a dash for a model without any and for a gap."""
    return str(row.seeds) if row.seeds else NOTHING


def metric_labels(table: Table) -> list[str]:
    """The headings of the columns beside the rewards; none where nothing was measured."""
    labels = [METRIC_LABELS[metric] for metric in table.metrics]
    return [*labels, HACKING_LABEL] if labels else []


def metric_values(table: Table, row: Row) -> tuple[Value, ...]:
    """The row's metrics, one for each that the table shows; gaps for the paper's rows."""
    return row.metrics or tuple(Value(0) for _ in table.metrics)


def hacking_text(table: Table, row: Row) -> str:
    """``no``, ``yes`` with what fell, or a dash where it cannot be judged."""
    if row.hacking is None:
        return NOTHING
    if not row.hacking.flagged:
        return "no"
    labels = {column.reward: column.label for column in table.columns} | METRIC_LABELS
    return f"yes ({', '.join(labels[name] for name in row.hacking.fell)})"


def legend(table: Table) -> tuple[str, ...]:
    """What the marks and intervals of a table mean; only those that occur."""
    rows = [row for group in table.groups for row in group.rows]
    values = [value for row in rows for value in row.values]
    if table.paper is not None:
        values += [v for group in table.paper.groups for row in group.rows for v in row.values]
    labels = {row.interval_label for row in rows}
    sentences = []
    if any(value.in_domain for value in values):
        sentences.append(f"{IN_DOMAIN} in-domain: the row was trained on this reward.")
    if any(value.best for value in values):
        sentences.append("Bold: the best of its group, as printed.")
    if "method" in labels:
        sentences.append(
            "Method intervals: 95% t intervals over the means of the training seeds; "
            "they are about training the method again."
        )
    if "checkpoint" in labels:
        sentences.append(
            "Checkpoint intervals: 95% bootstrap intervals over prompts; they are about these "
            "trained weights alone and say nothing of another seed."
        )
    return (*sentences, *_metric_legend(table))


_METRIC_SENTENCES = {
    DISTANCE: (
        "Image distance: mean of 1 - cosine over the pairs of a prompt's images in the features "
        "of an image tower; 0 where they are all alike."
    ),
    VENDI: (
        "Vendi score (Friedman and Dieng, 2022): the effective number of different images among "
        "those of a prompt; 1 where they are all alike."
    ),
    DRIFT: (
        "Drift: mean squared difference of velocity from the base on the base's own noised "
        "samples; 0 for the base, and neither good nor bad in itself."
    ),
}


_HACKING_SENTENCE = (
    f"{HACKING_LABEL}: yes where a reward that the row trains on is above the baseline with "
    "significance while another reward or the diversity is below it (those named); p < 0.05 after "
    "Holm's correction over the row's comparisons, about what its intervals are about; "
    f"{NOTHING} where it cannot be judged."
)


def _metric_legend(table: Table) -> list[str]:
    """One sentence a metric that the table shows, and one on reward hacking."""
    if not table.metrics:
        return []
    return [*(_METRIC_SENTENCES[metric] for metric in table.metrics), _HACKING_SENTENCE]
