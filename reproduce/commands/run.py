"""``g2rpo reproduce`` and ``plan``: a whole experiment, on this machine or on SLURM."""

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.errors import UserError
from g2rpo.files import check_writable
from reproduce.commands.options import (
    Cells,
    ClusterName,
    ExperimentName,
    Overrides,
    ProfileName,
    Publish,
    Results,
    Seeds,
    layout_of,
    plan_for,
)

if TYPE_CHECKING:
    from reproduce.jobs.plan import Plan
    from slurm.cluster import Cluster
    from slurm.submission import Submission

Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Parallel stages on this machine; default: one per GPU, or per core."),
]

Detach = Annotated[
    bool, typer.Option("--detach", help="Return after submitting; follow with `g2rpo status`.")
]


def reproduce(
    experiment: ExperimentName,
    profile: ProfileName = "mini",
    seeds: Seeds = None,
    cells: Cells = None,
    cluster: ClusterName = "auto",
    jobs: Jobs = None,
    detach: Detach = False,
    results: Results = Path("results"),
    publish: Publish = False,
    overrides: Overrides = None,
) -> None:
    """Run every cell of an experiment, then write and print its table.

    Finished stages are skipped. If interrupted, run the same command to resume. On SLURM, jobs
    are submitted and followed; they keep running after Ctrl-C or if the shell is closed.
    """
    layout = layout_of(results, publish=publish)
    plan, place = plan_for(
        experiment, profile, cluster, seeds, layout, overrides or (), runnable=True, only=cells
    )
    check_writable(results, "--results")
    if plan.todo and detach:
        _detach(plan, place)
        return
    if plan.todo:
        _run(plan, place, jobs)
    _report(plan)


def plan(
    experiment: ExperimentName,
    profile: ProfileName = "mini",
    seeds: Seeds = None,
    cells: Cells = None,
    cluster: ClusterName = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch scripts that would be submitted.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="List every stage.")] = False,
    results: Results = Path("results"),
    publish: Publish = False,
    overrides: Overrides = None,
) -> None:
    """Show what would run: stages, GPUs, hours and disk, and what is already done."""
    from reproduce.experiment.fingerprint import absent_inputs_named

    # Thousands of cells live until the end; collecting in between only costs time.
    gc.disable()
    with absent_inputs_named():
        layout = layout_of(results, publish=publish)
        made, place = plan_for(
            experiment,
            profile,
            cluster,
            seeds,
            layout,
            overrides or (),
            runnable=False,
            only=cells,
        )
        if dry_run:
            _print_scripts(made, place)
            return
        from reproduce.commands.plan_display import print_plan

        print_plan(made, place, everything=everything)


def _print_scripts(plan: "Plan", cluster: "Cluster") -> None:
    from reproduce.jobs import launch, stage_jobs
    from slurm.cluster import has_slurm
    from slurm.submit import scripts

    if cluster.kind != "slurm":
        raise UserError(
            f"--dry-run prints batch scripts, which cluster {cluster.name} does not use; "
            "add --cluster slurm or a cluster profile"
        )
    folder = stage_jobs.submissions_folder(plan.layout.runs) / "SUBMISSION"
    submission = launch.new_submission(plan, cluster, folder)
    active: dict[str, str] = {}
    if has_slurm():
        try:
            jobs = stage_jobs.active_stages(plan.layout.runs)
            active = {stage: job.job for stage, job in jobs.items()}
        except UserError as error:
            typer.echo(f"assuming that no jobs are running: {error}", err=True)
    for stages, text in scripts(submission, launch.left_to_submit(plan, active), active):
        typer.echo(f"# {', '.join(stages)}")
        typer.echo(text)


def _run(plan: "Plan", cluster: "Cluster", jobs: int | None) -> None:
    from reproduce.commands.plan_display import stage_estimates
    from reproduce.jobs import launch
    from reproduce.jobs.display import LocalDisplay
    from slurm.graph import Graph

    if cluster.kind == "slurm":
        follow_submission(_submit(plan, cluster))
        return
    submission = launch.save_submission(plan, cluster)
    # This process writes the table at the end, because it also prints it.
    todo = plan.todo.without([plan.render.name])
    # The longest first: a long training that begins last would leave the other workers idle.
    seconds = {name: estimate.seconds for name, estimate in stage_estimates(plan).items()}
    todo = Graph(sorted(todo.stages.values(), key=lambda stage: -seconds[stage.name]))
    planned = len(plan.graph) - 1  # without the table
    with LocalDisplay(submission, list(todo.stages.values()), planned) as display:
        launch.run_on_this_machine(submission, todo, jobs, display)


def _submit(plan: "Plan", cluster: "Cluster") -> "Submission":
    """Submits stages without a job; returns the submission that runs the plan."""
    from reproduce.jobs import launch

    submission = launch.submit_to_slurm(plan, cluster)
    if submission is None:
        typer.echo("all remaining stages are already queued or running", err=True)
        return launch.latest_submission(plan.layout.runs, plan.experiment.name)
    typer.echo(f"submitted {submission.name}; follow it with `g2rpo status --watch`", err=True)
    return submission


def follow_submission(submission: "Submission") -> None:
    """Shows a submission's state until all its stages have ended."""
    from reproduce.jobs.display import StatusDisplay

    try:
        with StatusDisplay() as display:
            display.follow(submission)
    except KeyboardInterrupt:
        typer.echo(
            "the jobs keep running; see `g2rpo status`, stop them with `g2rpo cancel`, or run the "
            "same command to follow them again",
            err=True,
        )
        sys.exit(130)


def _detach(plan: "Plan", cluster: "Cluster") -> None:
    from reproduce.jobs import launch

    if cluster.kind == "slurm":
        _submit(plan, cluster)
        return
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    log = launch.start_driver(plan.layout.runs, arguments)
    typer.echo(f"running in the background; see `g2rpo status`; output: {log}", err=True)


def run_again(submission: "Submission", *, only_failed: bool) -> None:
    """Runs the unfinished stages of a submission, from its own inputs, on its own cluster.

    Raises:
        UserError: nothing failed, or the plan cannot run.
    """
    from reproduce.jobs import runner
    from reproduce.jobs.plan import make_plan
    from reproduce.jobs.status import read_status
    from reproduce.stages.inputs import Inputs

    os.chdir(submission.directory)
    inputs = Inputs.load(submission.folder)
    made = make_plan(inputs.experiment, inputs.profile, inputs.cells(), inputs.layout)
    if only_failed:
        failed = [s.stage.name for s in read_status(submission) if s.word == "failed"]
        if not failed:
            raise UserError(f"{submission.name}: no stage failed")
        made = made.only(made.graph.downstream(failed))
    runner.check_hardware(inputs.profile, inputs.experiment, submission.cluster)
    if made.todo:
        _run(made, submission.cluster, None)
    _report(made)


def _report(plan: "Plan") -> None:
    """Writes and prints the table; failed cells are an error."""
    from reproduce.stages.base import perform
    from slurm.distributed import Ranks

    perform(plan.render, Ranks())
    gaps = plan.render.gaps
    if gaps:
        first = gaps[0]
        where = first.row if first.seed is None else f"{first.row}, seed {first.seed}"
        raise UserError(
            f"{len(gaps)} of {len(plan.cells)} cells failed; the first: {where}: {first.reason}; "
            "run the same command to retry"
        )
