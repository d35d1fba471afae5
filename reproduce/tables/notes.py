"""The notes under a table: what was measured and how, and what is missing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.evaluation.metrics import DISTANCE, DRIFT, VENDI
from benchmarks.evaluation.results import Cell, CellInfo, Protocol, RowScores
from benchmarks.evaluation.statistics import NOTHING
from reproduce.experiment.table import RowSpec, TableSpec
from reproduce.tables.comparisons import alike
from reproduce.tables.model import HACKING_LABEL, IN_DOMAIN, Column, Row

NOT_RUN = "not run"


@dataclass(frozen=True)
class Gap:
    """Why a row has no result (``interrupted at iteration 40``), or only ``seed`` of it."""

    row: str
    reason: str
    seed: int | None = None


def missing_reason(row: str, gaps: Iterable[Gap]) -> str:
    """Why a row has no result at all; ``not run`` if there is no reason."""
    given = [gap for gap in gaps if gap.row == row]
    whole = [gap.reason for gap in given if gap.seed is None]
    seeds = dict.fromkeys(gap.reason for gap in given)
    return whole[0] if whole else "; ".join(seeds) or NOT_RUN


def full_label(row: RowSpec | Row) -> str:
    """The row's label with its group, for use outside the table."""
    return f"{row.label} ({row.group})" if row.group else row.label


def table_notes(
    spec: TableSpec,
    columns: Mapping[str, str],
    results: Mapping[str, RowScores],
    gaps: Sequence[Gap],
) -> tuple[str, ...]:
    """The notes under a table, without the legend of its marks."""
    cells = [cell for result in results.values() for cell in result.cells]
    notes = []
    if cells:
        infos = [cell.info for cell in cells]
        counts = sorted({len(result.prompt_ids) for result in results.values()})
        protocols = {f"{info.protocol.title} ({info.protocol.hash})" for info in infos}
        prompts = " or ".join(str(count) for count in counts)
        notes.append(f"Evaluation: {', '.join(sorted(protocols))}, {prompts} held-out prompts.")
        notes.extend(_protocol_notes(spec, results))
        notes.extend(dict.fromkeys(note for info in infos for note in _measured(info.protocol)))
        presets = {info.preset for info in infos} - {None}
        if presets:
            notes.append(f"Preset: {', '.join(sorted(map(str, presets)))}.")
        notes.append(f"Measured at commit {', '.join(sorted({_commit(c) for c in infos}))}.")
    notes.extend(_cost_notes(spec, cells))
    notes.extend(_checkpoint_notes(spec, results))
    notes.extend(_gap_notes(spec, columns, results, gaps))
    notes.extend(_baseline_notes(spec, results))
    return (*notes, *spec.notes)


def _protocol_notes(spec: TableSpec, results: Mapping[str, RowScores]) -> list[str]:
    """The settings of each protocol, with the groups that have it if there are several."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for row in (row for row in spec.rows if row.key in results):
        for info in (cell.info for cell in results[row.key].cells):
            if info.sampling:
                groups.setdefault((info.protocol.title, info.sampling), {})[row.group] = None
    label = spec.group_label.lower()
    return [
        f"Protocol {name}"
        + (f" ({label} {' and '.join(filter(None, used))})" if len(groups) > 1 else "")
        + f": {line}."
        for (name, line), used in groups.items()
    ]


def _measured(protocol: Protocol) -> list[str]:
    """What the metrics beside the rewards were measured on."""
    diversity, drift = protocol.diversity, protocol.drift
    notes = []
    if diversity is not None:
        notes.append(
            f"Diversity: {diversity.images} images per prompt, first {diversity.prompts} prompts, "
            f"features of {diversity.features}."
        )
    if drift is not None:
        sigmas = ", ".join(f"{sigma:g}" for sigma in drift.sigmas)
        notes.append(f"Drift: first {drift.prompts} prompts, sigma {sigmas}.")
    return notes


def _commit(info: CellInfo) -> str:
    commit = (info.provenance.git_commit or "unknown")[:12]
    return commit + (" with uncommitted changes" if info.provenance.git_dirty else "")


def _checkpoint_notes(spec: TableSpec, results: Mapping[str, RowScores]) -> list[str]:
    """Where weights trained elsewhere came from."""
    cost = "; their training cost is unknown" if spec.costs else ""
    return [
        f"{full_label(row)}: weights from {source}, not trained here{cost}."
        for row in spec.rows
        if row.key in results
        for source in sorted(
            {str(cell.info.provenance.checkpoint) for cell in results[row.key].cells} - {"None"}
        )
    ]


def _cost_notes(spec: TableSpec, cells: Sequence[Cell]) -> list[str]:
    known = [cell.info.cost for cell in cells if cell.info.cost is not None]
    trained = [cost for cost in known if cost.iterations > 0]
    if not spec.costs or not trained:
        return []
    devices = sorted({cost.device for cost in trained}) if "device_seconds" in spec.costs else []
    return cost_notes(devices)


def cost_notes(devices: Sequence[str]) -> list[str]:
    """What the costs cover, and on which devices the seconds were measured."""
    notes = ["Costs: one training run up to the evaluated checkpoint, mean over seeds."]
    if devices:
        more = "" if len(devices) == 1 else "; seconds on different devices are not comparable"
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


def _baseline_notes(spec: TableSpec, results: Mapping[str, RowScores]) -> list[str]:
    """Which rows are not compared with the baseline, having been evaluated differently."""
    base = None if spec.baseline is None else results.get(spec.baseline)
    others = [
        row
        for row in spec.rows
        if base is not None and row.key in results and not alike(results[row.key], base)
    ]
    if not others:
        return []
    label = next(full_label(row) for row in spec.rows if row.key == spec.baseline)
    names = ", ".join(map(full_label, others))
    return [f"Not compared with {label}, evaluated on other prompts or differently: {names}."]


def legend(
    rows: Sequence[Row], published: Sequence[Row], columns: Sequence[Column]
) -> tuple[str, ...]:
    """What the marks and intervals that occur in a table mean."""
    scores = [score for row in (*rows, *published) for score in row.scores.values()]
    names = {column.name for column in columns}
    labels = {row.about for row in rows}
    occurs = {
        f"{IN_DOMAIN} In-domain: the row was trained on this reward.": (
            any(names & set(row.trained_on) for row in rows) or any(s.in_domain for s in scores)
        ),
        "Bold: best of its group, as printed.": any(score.best for score in scores),
        (
            "Method intervals: seed-level 95% confidence intervals (Student's t over the training "
            "seeds). They cover retraining the method."
        ): "method" in labels,
        (
            "Checkpoint intervals: prompt-level 95% confidence intervals (bootstrap over the "
            "prompts). They cover these trained weights only, not other seeds."
        ): "checkpoint" in labels,
    }
    return tuple(sentence for sentence, there in occurs.items() if there)


_METRIC_SENTENCES = {
    DISTANCE: (
        "Image distance: mean of 1 - cosine over the pairs of a prompt's images, in the features "
        "of an image tower; 0 if all images are the same."
    ),
    VENDI: (
        "Vendi score (Friedman and Dieng, 2022): effective number of distinct images per prompt; "
        "1 if all images are the same."
    ),
    DRIFT: (
        "Drift: mean squared difference between the policy's velocity and the base's on noised "
        "samples of the base; 0 for the base. It is neither good nor bad."
    ),
}
_HACKING_SENTENCE = (
    f"{HACKING_LABEL}: yes if a training reward is significantly above the baseline while another "
    "reward or the diversity (listed) is significantly below it (p < 0.05 after Holm's correction "
    f"over the row's comparisons, at the level of its intervals); {NOTHING} if it cannot be tested."
)


def metric_legend(metrics: Sequence[Column]) -> tuple[str, ...]:
    """One sentence per metric in the table, and one on reward hacking."""
    if not metrics:
        return ()
    return (*(_METRIC_SENTENCES[metric.name] for metric in metrics), _HACKING_SENTENCE)
