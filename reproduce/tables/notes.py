"""The sentences under a table: what was measured and how, and what is missing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.evaluation.metrics import DISTANCE, DRIFT, VENDI
from benchmarks.evaluation.results import Cell, RowScores
from benchmarks.evaluation.statistics import NOTHING
from reproduce.experiment.table import RowSpec, TableSpec
from reproduce.tables.model import HACKING_LABEL, IN_DOMAIN, Column, Row

NOT_RUN = "not run"


@dataclass(frozen=True)
class Gap:
    """Why a row, or one seed of it, has no result.

    Attributes:
        row: the row's key.
        reason: a few words, e.g. ``interrupted at iteration 40``.
        seed: the seed that is missing, or None for the whole row.
    """

    row: str
    reason: str
    seed: int | None = None


def missing_reason(row: str, gaps: Iterable[Gap]) -> str:
    """Why a row has no result at all; ``not run`` where nobody gave a reason."""
    given = [gap for gap in gaps if gap.row == row]
    whole = [gap.reason for gap in given if gap.seed is None]
    seeds = dict.fromkeys(gap.reason for gap in given)
    return whole[0] if whole else "; ".join(seeds) or NOT_RUN


def full_label(row: RowSpec) -> str:
    """The row's label with its group, as it is named outside the table."""
    return f"{row.label} ({row.group})" if row.group else row.label


def table_notes(
    spec: TableSpec,
    columns: Mapping[str, str],
    results: Mapping[str, RowScores],
    gaps: Sequence[Gap],
) -> tuple[str, ...]:
    """The sentences under a table, without the legend of its marks."""
    cells = [cell for result in results.values() for cell in result.cells]
    notes = []
    if cells:
        counts = sorted({len(result.prompt_ids) for result in results.values()})
        protocols = {(c.info.protocol.name, c.info.protocol.hash) for c in cells}
        named = ", ".join(f"{name} ({digest})" for name, digest in sorted(protocols))
        prompts = " or ".join(str(count) for count in counts)
        notes.append(f"Evaluation: {named}, {prompts} held-out prompts.")
        notes.extend(_measurements(cells))
        presets = sorted({c.info.preset for c in cells if c.info.preset is not None})
        if presets:
            notes.append(f"Preset: {', '.join(presets)}.")
        notes.append(_commits(cells))
    notes.extend(_cost_notes(spec, cells))
    notes.extend(_checkpoint_notes(spec, results))
    notes.extend(_gap_notes(spec, columns, results, gaps))
    return (*notes, *spec.notes)


def _measurements(cells: Iterable[Cell]) -> list[str]:
    """What the columns beside the rewards were measured on."""
    notes = []
    for protocol in (cell.info.protocol for cell in cells):
        diversity, drift = protocol.diversity, protocol.drift
        if diversity is not None:
            notes.append(
                f"Diversity: {diversity.images} images of each of the first {diversity.prompts} "
                f"prompts, features of {diversity.features}."
            )
        if drift is not None:
            sigmas = ", ".join(f"{sigma:g}" for sigma in drift.sigmas)
            notes.append(f"Drift: the first {drift.prompts} prompts at sigma {sigmas}.")
    return list(dict.fromkeys(notes))


def _commits(cells: Iterable[Cell]) -> str:
    states = {(c.info.provenance.git_commit, c.info.provenance.git_dirty) for c in cells}
    named = sorted(
        ("unknown" if commit is None else commit[:12])
        + (" with uncommitted changes" if dirty else "")
        for commit, dirty in states
    )
    return f"Measured at commit {', '.join(named)}."


def _checkpoint_notes(spec: TableSpec, results: Mapping[str, RowScores]) -> list[str]:
    """Where weights that were trained elsewhere came from."""
    notes = []
    for row in spec.rows:
        cells = results[row.key].cells if row.key in results else ()
        sources = {cell.info.provenance.checkpoint for cell in cells} - {None}
        for source in sorted(str(source) for source in sources):
            cost = "; what it took to train them is not known" if spec.costs else ""
            notes.append(f"{full_label(row)}: weights of {source}, not trained here{cost}.")
    return notes


def _cost_notes(spec: TableSpec, cells: Sequence[Cell]) -> list[str]:
    known = [cell.info.cost for cell in cells if cell.info.cost is not None]
    trained = [cost for cost in known if cost.iterations > 0]
    if not spec.costs or not trained:
        return []
    notes = ["Costs: one training run up to the evaluated checkpoint, mean over seeds."]
    devices = sorted({cost.device for cost in trained})
    if "device_seconds" in spec.costs:
        more = "" if len(devices) == 1 else "; seconds on different devices do not compare"
        notes.append(f"Trained on {', '.join(devices)}{more}.")
    return notes


def _gap_notes(
    spec: TableSpec,
    columns: Mapping[str, str],
    results: Mapping[str, RowScores],
    gaps: Sequence[Gap],
) -> list[str]:
    notes = []
    for row in spec.rows:
        result = results.get(row.key)
        if result is None:
            continue
        unscored = [label for name, label in columns.items() if name not in result.rewards]
        if unscored:
            notes.append(f"{full_label(row)}: not scored by {', '.join(unscored)}.")
        notes.extend(
            f"{full_label(row)}: seed {gap.seed} is missing ({gap.reason})."
            for gap in gaps
            if gap.row == row.key and gap.seed is not None and gap.seed not in result.seeds
        )
    return notes


def legend(
    rows: Sequence[Row], published: Sequence[Row], columns: Sequence[Column]
) -> tuple[str, ...]:
    """What the marks and intervals of a table mean; only those that occur."""
    scores = [score for row in (*rows, *published) for score in row.scores.values()]
    names = {column.name for column in columns}
    labels = {row.about for row in rows}
    sentences = []
    if any(names & set(row.trained_on) for row in rows) or any(s.in_domain for s in scores):
        sentences.append(f"{IN_DOMAIN} in-domain: the row was trained on this reward.")
    if any(score.best for score in scores):
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
    return tuple(sentences)


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


def metric_legend(metrics: Sequence[Column]) -> tuple[str, ...]:
    """One sentence for each measure that the table shows, and one on reward hacking."""
    if not metrics:
        return ()
    return (*(_METRIC_SENTENCES[metric.name] for metric in metrics), _HACKING_SENTENCE)
