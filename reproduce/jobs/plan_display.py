"""``g2rpo plan`` for people: what there is to do, what it takes, and what is not there yet."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from g2rpo.errors import UserError
from reproduce.commands.console import literal, plain_table, wide_console
from reproduce.experiment import absolute
from reproduce.jobs.estimates import (
    Estimate,
    credit_estimate,
    embedding_estimate,
    prompt_count,
    rendering_estimate,
    sampling_estimate,
    scoring_estimate,
    training_estimate,
)
from reproduce.jobs.plan import Plan
from reproduce.jobs.schedule import Task, schedule_wall
from reproduce.jobs.speeds import Speeds, speeds_of
from reproduce.stages.work import Measurement, Work
from slurm.cluster import Cluster
from slurm.graph import Stage

KINDS = ("embed", "train", "sample", "score", "credit", "render")


def stage_estimates(plan: Plan) -> dict[str, Estimate]:
    """What every stage takes, by its name; of those that are done too.

    Raises:
        UserError: a prompt file is not there and nobody knows how many prompts it will have.
    """
    speeds = speeds_of(plan.profile)
    referenced: set[Path] = set()
    return {
        stage.name: _estimate(plan, stage, speeds, referenced)
        for stage in plan.graph.stages.values()
    }


def _estimate(plan: Plan, stage: Stage, speeds: Speeds, referenced: set[Path]) -> Estimate:
    work = plan.works.get(stage.name)
    hardware = plan.profile.hardware
    if isinstance(work, Work):
        if work.kind == "train":
            assert work.cell.train is not None
            return training_estimate(work.cell.train, hardware, speeds)
        if work.kind == "score":
            return scoring_estimate(work.cell, work.share, speeds)
        reference = False
        if work.share.first and not work.cell.is_base and work.cell.evaluation.drift is not None:
            path = work.layout.drift_reference(work.cell)
            reference = path not in referenced and not path.exists()
            referenced.add(path)
        return sampling_estimate(work.cell, work.share, speeds, reference=reference)
    if isinstance(work, Measurement):
        assert work.cell.train is not None
        return credit_estimate(work.cell.train, work.config, hardware, speeds)
    if work is not None:
        return embedding_estimate(_prompts(plan), plan.profile.policy, hardware, speeds)
    return rendering_estimate(speeds)


def _prompts(plan: Plan) -> int:
    """Prompts that are encoded, at most: what the trainings draw, and those to be judged on."""
    drawn: dict[tuple[str, int], int] = {}
    files: set[str] = set()
    for cell in plan.cells:
        files.add(cell.evaluation_prompts)
        if cell.train is not None:
            train = cell.train
            count = train.optimization.iterations * train.rollout.prompts_per_iteration
            key = (train.prompts.file, train.seed)
            drawn[key] = max(drawn.get(key, 0), count)
            if train.validation is not None:
                files.add(train.validation.file)
    total = sum(prompt_count(Path(file)) or 0 for file in files)
    for file in {file for file, _ in drawn}:
        count = sum(number for (of, _), number in drawn.items() if of == file)
        total += min(count, prompt_count(Path(file)) or count)
    return total


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
    for line in (*_notes(plan, cluster, estimates), *missing_inputs(plan)):
        console.print(literal(line), soft_wrap=True)


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2f}" if hours >= 0.1 else f"{hours:.4f}"


def readable_bytes(size: float) -> str:
    """A size for people, in powers of ten."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def _cells(estimate: Estimate | None) -> tuple[str, str]:
    if estimate is None:
        return "?", "?"
    mark = "" if estimate.measured else "~"
    return f"{mark}{_hours(estimate.device_seconds)}", readable_bytes(estimate.disk_bytes)


def _kind_table(plan: Plan, cluster: Cluster, estimates: Mapping[str, Estimate]) -> object:
    hours = "GPU-hours" if plan.profile.hardware.gpus else "core-hours"
    columns = ("stage", "jobs", "done", "to do", "nodes x ranks", "GPUs each", hours, "disk")
    table = plain_table(*columns, right=columns[1:])
    todo = plan.todo.stages
    for kind in KINDS:
        stages = [stage for stage in plan.graph.stages.values() if stage.kind == kind]
        if not stages:
            continue
        left = [stage for stage in stages if stage.name in todo]
        total = _total(left, estimates)
        needs = stages[0].resources
        shape = f"{cluster.nodes(needs)} x {cluster.tasks(needs)}"
        done = len(stages) - len(left)
        table.add_row(
            kind,
            str(len(stages)),
            str(done),
            str(len(left)),
            shape,
            str(needs.gpus),
            *_cells(total),
        )
    total = _total(todo.values(), estimates)
    table.add_row("in all", str(len(plan.graph)), str(len(plan.graph) - len(todo)),
                  str(len(todo)), "", "", *_cells(total))  # fmt: skip
    return table


def _total(stages: Iterable[Stage], estimates: Mapping[str, Estimate]) -> Estimate | None:
    found = [estimates.get(stage.name) for stage in stages]
    known = [estimate for estimate in found if estimate is not None]
    return Estimate.total(known) if len(known) == len(found) else None


def _stage_table(plan: Plan, estimates: Mapping[str, Estimate]) -> object:
    table = plain_table("stage", "of", "state", "GPUs", "hours", "disk", "name",
                        right=("GPUs", "hours", "disk"))  # fmt: skip
    todo = plan.todo.stages
    for stage in plan.graph.stages.values():
        table.add_row(
            stage.kind,
            stage.label,
            "to do" if stage.name in todo else "done",
            str(stage.resources.gpus),
            *_cells(estimates.get(stage.name)),
            stage.name,
        )
    return table


def _notes(plan: Plan, cluster: Cluster, estimates: Mapping[str, Estimate]) -> list[str]:
    todo = plan.todo
    if not todo:
        return ["nothing is left to do: everything is complete for this configuration"]
    if not estimates:
        return []
    notes = [f"wall time: about {_wall(plan, cluster, estimates)}"]
    speeds = speeds_of(plan.profile)
    notes.append(f"speeds: {speeds.hardware} (reproduce/jobs/speeds.yaml)")
    if cluster.gpu_type is not None and cluster.gpu_type.lower() not in speeds.hardware.lower():
        notes.append(
            f"the cluster's GPUs are {cluster.gpu_type}: hours and wall time are not theirs"
        )
    if any(not estimates[name].measured for name in todo.stages):
        notes.append("~ is derived, not measured: see the sources there")
    return notes


def _wall(plan: Plan, cluster: Cluster, estimates: Mapping[str, Estimate]) -> str:
    """The predicted wall time of what is left; without waiting for free nodes on a cluster."""
    from slurm.local import Slots

    todo, speeds = plan.todo, speeds_of(plan.profile)
    slots = Slots.found().count if cluster.kind == "local" else 1
    if cluster.kind == "slurm":
        slots = max(1, len(todo))
    tasks = {
        stage.name: Task(
            estimates[stage.name].wall_seconds,
            (*stage.needs, *stage.after),
            1 if cluster.kind == "slurm" else stage.resources.ranks,
        )
        for stage in todo.stages.values()
    }
    start = 0.0 if plan.profile.hardware.gpus else speeds.process.seconds
    seconds = schedule_wall(tasks, slots, start=start)
    text = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"
    if cluster.kind == "slurm":
        return f"{text} where every job starts at once"
    return f"{text} with {slots} at a time"


def missing_inputs(plan: Plan) -> list[str]:
    """What has to be fetched before this can run, with the command."""
    from reproduce.commands.weights import unfetched

    prompts = plan.profile.prompts
    absent = [
        path
        for path in (prompts.train, prompts.validation, prompts.test)
        if not Path(absolute(path)).exists()
    ]
    lines = []
    if absent:
        lines.append(f"not there yet: {', '.join(absent)}: `g2rpo prompts fetch` (docs/weights.md)")
    names = unfetched(plan.profile)
    if names:
        lines.append(
            f"not fetched yet: {', '.join(names)}: `g2rpo weights fetch {' '.join(names)}`"
        )
    return lines
