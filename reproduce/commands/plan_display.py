"""``g2rpo plan`` for people: what there is to do, what it takes, and what is not there yet."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich import filesize

from benchmarks.evaluation.protocol import CreditConfig
from g2rpo.errors import UserError
from g2rpo.terminal import literal, plain_table, wide_console
from g2rpo.training.config import TrainConfig
from reproduce.experiment import ResolvedCell, absolute
from reproduce.experiment.weights import missing_weights
from reproduce.jobs.estimates import Estimate, Estimator
from reproduce.jobs.plan import Plan
from reproduce.jobs.speeds import speeds_of
from reproduce.stages.base import Stage
from reproduce.stages.embedding import Embed
from reproduce.stages.evaluation import Sample, Score
from reproduce.stages.run import CLASSES
from reproduce.stages.training import Credit, Train
from slurm import graph
from slurm.cluster import Cluster
from slurm.local import Slots

KINDS = tuple(CLASSES)


def stage_estimates(plan: Plan) -> dict[str, Estimate]:
    """What every stage takes, by its name; of those that are done too.

    Raises:
        UserError: a prompt file is not there and nobody knows how many prompts it will have.
    """
    estimator = Estimator(plan.profile, speeds_of(plan.profile))

    def estimate(stage: Stage) -> Estimate:
        match stage:
            case Embed():
                return estimator.embed(plan.cells)
            case Train(cell=ResolvedCell(train=TrainConfig() as train)):
                return estimator.train(train)
            case Sample():
                return estimator.sample(stage.cell, stage.share)
            case Score():
                return estimator.score(stage.cell, stage.share)
            case Credit(
                cell=ResolvedCell(train=TrainConfig() as train, credit=CreditConfig() as c)
            ):
                return estimator.credit(train, c)
            case _:
                return estimator.render()

    return {name: estimate(stage) for name, stage in plan.stages.items()}


def wall_seconds(
    stages: Iterable[graph.Stage], seconds: Mapping[str, float], slots: int | None
) -> float:
    """Seconds until the last of ``stages`` ends, each given after those that it depends on.

    The longest chain of dependent stages, or the work of all on ``slots`` workers where that is
    longer; None is as many workers as there are stages.
    """
    ends: dict[str, float] = {}
    work = 0.0
    for stage in stages:
        ready = max((ends.get(name, 0.0) for name in (*stage.needs, *stage.after)), default=0.0)
        ends[stage.name] = ready + seconds[stage.name]
        work += seconds[stage.name] * min(stage.resources.ranks, slots or 1)
    return max([0.0, *ends.values()] if slots is None else [work / slots, *ends.values()])


def print_plan(plan: Plan, cluster: Cluster, *, everything: bool = False) -> None:
    """Prints the plan: a row per kind of stage, or with ``everything`` one per stage as well."""
    console = wide_console()
    experiment, profile = plan.experiment, plan.profile
    head = f"{experiment.name}, profile {profile.name}: {len(plan.cells)} cells"
    console.print(literal(f"{head}, on {cluster.name} ({cluster.kind})"))
    try:
        estimates = stage_estimates(plan)
    except UserError as error:
        estimates = {}
        console.print(literal(f"no estimate: {error}"))
    if everything:
        console.print(_stage_table(plan, estimates))
    console.print(_kind_table(plan, cluster, estimates))
    for line in (*_notes(plan, cluster, estimates), *_missing_inputs(plan)):
        console.print(literal(line), soft_wrap=True)


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2f}" if hours >= 0.1 else f"{hours:.4f}"


def _needs(stages: Iterable[graph.Stage], estimates: Mapping[str, Estimate]) -> tuple[str, str]:
    """Hours of devices and disk of ``stages``."""
    if not estimates:
        return "?", "?"
    found = [estimates[stage.name] for stage in stages]
    mark = "" if all(estimate.measured for estimate in found) else "~"
    hours = _hours(sum(estimate.seconds * estimate.devices for estimate in found))
    return f"{mark}{hours}", filesize.decimal(round(sum(estimate.disk_bytes for estimate in found)))


def _kind_table(plan: Plan, cluster: Cluster, estimates: Mapping[str, Estimate]) -> object:
    hours = "GPU-hours" if plan.profile.hardware.gpus else "core-hours"
    columns = ("stage", "jobs", "done", "to do", "nodes x ranks", "GPUs each", hours, "disk")
    table = plain_table(*columns, right=columns[1:])
    everything = list(plan.graph.stages.values())
    for kind in (*KINDS, "in all"):
        stages = [stage for stage in everything if kind in (stage.kind, "in all")]
        if not stages:
            continue
        left = [stage for stage in stages if stage.name in plan.todo.stages]
        counts = map(str, (len(stages), len(stages) - len(left), len(left)))
        needs = stages[0].resources
        shape = (f"{cluster.nodes(needs)} x {cluster.tasks(needs)}", str(needs.gpus))
        shape = ("", "") if kind == "in all" else shape
        table.add_row(kind, *counts, *shape, *_needs(left, estimates))
    return table


def _stage_table(plan: Plan, estimates: Mapping[str, Estimate]) -> object:
    table = plain_table("stage", "of", "state", "GPUs", "hours", "disk", "name",
                        right=("GPUs", "hours", "disk"))  # fmt: skip
    for stage in plan.graph.stages.values():
        state = "to do" if stage.name in plan.todo.stages else "done"
        gpus = str(stage.resources.gpus)
        needs = _needs([stage], estimates)
        table.add_row(stage.kind, stage.label, state, gpus, *needs, stage.name)
    return table


def _notes(plan: Plan, cluster: Cluster, estimates: Mapping[str, Estimate]) -> list[str]:
    if not plan.todo:
        return ["nothing is left to do: everything is complete for this configuration"]
    if not estimates:
        return []
    speeds = speeds_of(plan.profile)
    notes = [
        f"wall time: about {_wall(plan, cluster, estimates)}",
        f"speeds: {speeds.hardware} (reproduce/jobs/speeds.yaml)",
    ]
    if cluster.gpu_type is not None and cluster.gpu_type.lower() not in speeds.hardware.lower():
        notes.append(
            f"the cluster's GPUs are {cluster.gpu_type}: hours and wall time are not theirs"
        )
    if any(not estimates[name].measured for name in plan.todo.stages):
        notes.append("~ is derived, not measured: see the sources there")
    return notes


def _wall(plan: Plan, cluster: Cluster, estimates: Mapping[str, Estimate]) -> str:
    """The predicted wall time of what is left; without waiting for free nodes on a cluster."""
    slots = {"slurm": None, "local": Slots.found().count}.get(cluster.kind, 1)
    seconds = {name: estimate.seconds for name, estimate in estimates.items()}
    wall = wall_seconds(plan.todo.stages.values(), seconds, slots)
    if not plan.profile.hardware.gpus:
        wall += speeds_of(plan.profile).process.seconds
    text = f"{wall / 3600:.1f} h" if wall > 5400 else f"{wall / 60:.1f} min"
    where = "where every job starts at once" if slots is None else f"with {slots} at a time"
    return f"{text} {where}"


def _missing_inputs(plan: Plan) -> list[str]:
    """What has to be fetched before this can run, with the command."""
    prompts = plan.profile.prompts
    paths = (prompts.train, prompts.validation, prompts.test)
    absent = [path for path in paths if not Path(absolute(path)).exists()]
    lines = []
    if absent:
        lines.append(f"not there yet: {', '.join(absent)}: `g2rpo prompts fetch` (docs/weights.md)")
    states = missing_weights(plan.profile)
    if names := [state.artifact.name for state in states if state.word != "altered"]:
        lines.append(
            f"not fetched yet: {', '.join(names)}: `g2rpo weights fetch {' '.join(names)}`"
        )
    return lines
