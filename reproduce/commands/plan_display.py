"""Prints a plan: what is left to do, what it costs, and which inputs are missing."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich import filesize

from benchmarks.evaluation.protocol import CreditConfig
from g2rpo.errors import UserError
from g2rpo.policy.size import assumption, model_size
from g2rpo.terminal import literal, plain_table, wide_console
from g2rpo.training.config import TrainConfig
from g2rpo.training.memory import GIB, encoding_bytes, gpu_bytes
from reproduce.experiment import ResolvedCell, absolute
from reproduce.experiment.weights import missing_weights
from reproduce.jobs.estimates import Estimate, Estimator
from reproduce.jobs.plan import Plan
from reproduce.jobs.speeds import speeds_of
from reproduce.stages.base import Stage
from reproduce.stages.cells import Sample, Score
from reproduce.stages.embedding import Embed
from reproduce.stages.run import CLASSES
from reproduce.stages.training import Credit, Train
from slurm import graph
from slurm.cluster import Cluster
from slurm.local import Slots

KINDS = tuple(CLASSES)


def stage_estimates(plan: Plan) -> dict[str, Estimate]:
    """The estimated cost of every stage by name, finished ones included.

    Raises:
        UserError: a prompt file is missing, so its number of prompts is unknown.
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
    """Seconds until the last stage ends; ``stages`` are in order of their dependencies.

    The longest chain of dependent stages, or the total work on ``slots`` workers if that is longer;
    None is one worker per stage.
    """
    ends: dict[str, float] = {}
    work = 0.0
    for stage in stages:
        ready = max((ends.get(name, 0.0) for name in (*stage.needs, *stage.after)), default=0.0)
        ends[stage.name] = ready + seconds[stage.name]
        work += seconds[stage.name] * min(stage.resources.ranks, slots or 1)
    return max([0.0, *ends.values()] if slots is None else [work / slots, *ends.values()])


def print_plan(plan: Plan, cluster: Cluster, *, everything: bool = False) -> None:
    """Prints one row per kind of stage, and with ``everything`` one row per stage."""
    console = wide_console()
    experiment, profile = plan.experiment, plan.profile
    head = f"{experiment.name}, profile {profile.name}: {len(plan.cells)} cells"
    where = "this machine" if cluster.kind == "local" else "SLURM"
    named = "" if cluster.name == cluster.kind else f" (cluster profile {cluster.name})"
    console.print(literal(f"{head}, on {where}{named}"))
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
    """Device hours and disk space of ``stages``."""
    if not estimates:
        return "?", "?"
    costs = [estimates[stage.name] for stage in stages]
    mark = "" if all(cost.measured for cost in costs) else "~"
    hours = _hours(sum(cost.seconds * cost.devices for cost in costs))
    return f"{mark}{hours}", filesize.decimal(round(sum(cost.disk_bytes for cost in costs)))


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
        return ["nothing to do: everything is complete for this configuration"]
    if not estimates:
        return []
    speeds = speeds_of(plan.profile)
    notes = [
        f"wall time: about {_wall(plan, cluster, estimates)}",
        *_memory(plan),
        f"speeds: {speeds.hardware} (reproduce/jobs/speeds.yaml)",
    ]
    if cluster.gpu_type is not None and cluster.gpu_type.lower() not in speeds.hardware.lower():
        notes.append(f"the cluster has {cluster.gpu_type} GPUs, so hours and wall time will differ")
    if any(not estimates[name].measured for name in plan.todo.stages):
        notes.append("~ marks estimates that are derived, not measured")
    assumed = (assumption(cell.policy) for cell in plan.cells)
    return [*notes, *dict.fromkeys(note for note in assumed if note is not None)]


def _memory(plan: Plan) -> list[str]:
    """The most memory that a GPU needs."""
    hardware = plan.profile.hardware
    trained = {cell.key: cell.train for cell in plan.cells if cell.train is not None}.values()
    if not hardware.gpus or not trained:
        return []
    ranks = hardware.training_ranks
    most = max(sum(gpu_bytes(each, model_size(each.policy), ranks).values()) for each in trained)
    encoders = encoding_bytes(plan.cells[0].policy)
    found = f"about {most / GIB:.1f} GiB to train, {encoders / GIB:.1f} GiB to encode prompts"
    return [f"memory per GPU: {found}"]


def _wall(plan: Plan, cluster: Cluster, estimates: Mapping[str, Estimate]) -> str:
    """The predicted wall time of the remaining stages, without queueing on a cluster."""
    slots = {"slurm": None, "local": Slots.found().count}.get(cluster.kind, 1)
    seconds = {name: estimate.seconds for name, estimate in estimates.items()}
    wall = wall_seconds(plan.todo.stages.values(), seconds, slots)
    if not plan.profile.hardware.gpus:
        wall += speeds_of(plan.profile).process.seconds
    text = f"{wall / 3600:.1f} h" if wall > 5400 else f"{wall / 60:.1f} min"
    where = "if every job starts at once" if slots is None else f"with {slots} at a time"
    return f"{text} {where}"


def _missing_inputs(plan: Plan) -> list[str]:
    """The missing inputs, each with the command that fetches them."""
    prompts = plan.profile.prompts
    paths = (prompts.train, prompts.validation, prompts.test)
    absent = [path for path in paths if not Path(absolute(path)).exists()]
    lines = []
    if absent:
        lines.append(f"missing prompts: {', '.join(absent)}; run `g2rpo prompts fetch`")
    states = missing_weights(plan.profile)
    if names := [state.artifact.name for state in states if state.word != "altered"]:
        lines.append(
            f"missing weights: {', '.join(names)}; run `g2rpo weights fetch {' '.join(names)}`"
        )
    return [*lines, *_absent_servers(plan)]


def _absent_servers(plan: Plan) -> list[str]:
    """The servers of rewards that do not answer: runs are named by what they report."""
    servers = {name: reward.server for name, reward in plan.profile.rewards.items()}
    lines = []
    for name, server in servers.items():
        if server is None:
            continue
        from g2rpo.rewards.http import server_info  # slow: a client library

        try:
            server_info(server)
        except UserError as error:
            lines.append(
                f"reward {name}: {error}; without its answer, the plan cannot find the runs that "
                "are done"
            )
    return lines
