"""``g2rpo reproduce`` and ``plan``: a whole experiment, wherever it runs."""

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.errors import UserError
from reproduce.commands.options import (
    ClusterName,
    ExperimentName,
    Overrides,
    ProfileName,
    Publish,
    Request,
    Results,
    Seeds,
)

if TYPE_CHECKING:
    from reproduce.jobs.plan import Plan
    from slurm.cluster import Cluster
    from slurm.submission import Submission

Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Stages at once on this machine; default: one per GPU, else core."),
]


def reproduce(
    experiment: ExperimentName,
    profile: ProfileName = "mini",
    seeds: Seeds = None,
    cluster: ClusterName = "auto",
    jobs: Jobs = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once it is submitted (see `g2rpo status`).")
    ] = False,
    results: Results = Path("results"),
    publish: Publish = False,
    overrides: Overrides = None,
) -> None:
    """Run every cell of an experiment, then write and print its table.

    What is done already is not done again; interrupted, it goes on where it was. On SLURM it
    submits, then follows: Ctrl-C or a closed shell leaves the jobs running.
    """
    request = Request(experiment, profile, cluster, seeds, results, publish, overrides or ())
    plan, place = request.plan(runnable=True)
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
    cluster: ClusterName = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch scripts as SLURM would get them.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="List every stage.")] = False,
    results: Results = Path("results"),
    publish: Publish = False,
    overrides: Overrides = None,
) -> None:
    """Show what would be run: stages, GPUs, hours and disk, and what is done already."""
    request = Request(experiment, profile, cluster, seeds, results, publish, overrides or ())
    from reproduce.experiment.fingerprint import absent_prompts_named

    # The collector would only walk, again and again, what all lives until the end.
    gc.disable()
    with absent_prompts_named():
        made, place = request.plan(runnable=False)
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
            f"--dry-run prints batch scripts, and cluster {cluster.name} has none: "
            "add --cluster slurm or a cluster profile"
        )
    folder = stage_jobs.submissions_folder(plan.layout.runs) / "SUBMISSION"
    submission = launch.new_submission(plan, cluster, folder)
    active: dict[str, str] = {}
    if has_slurm():
        try:
            found = stage_jobs.active_stages(plan.layout.runs)
            active = {stage: job.job for stage, job in found.items()}
        except UserError as error:
            typer.echo(f"as if no job ran: {error}", err=True)
    for script in scripts(submission, launch.left_to_submit(plan, active), active):
        typer.echo(f"# {', '.join(script.stages)}")
        typer.echo(script.text)


def _run(plan: "Plan", cluster: "Cluster", jobs: int | None) -> None:
    from reproduce.jobs import launch
    from reproduce.jobs.display import LocalDisplay

    if cluster.kind == "slurm":
        follow_submission(_submit(plan, cluster))
        return
    submission = launch.save_submission(plan, cluster)
    # The table is written by this process, which prints it.
    todo = plan.todo.without([plan.render.name])
    with LocalDisplay(submission, len(todo)) as display:
        launch.run_on_this_machine(submission, todo, jobs, display)


def _submit(plan: "Plan", cluster: "Cluster") -> "Submission":
    """Submits what has no job yet; the submission that now has the plan's stages."""
    from reproduce.jobs import launch

    submission = launch.submit_to_slurm(plan, cluster)
    if submission is None:
        typer.echo("all that is left to do waits or runs already", err=True)
        return launch.latest_submission(plan.layout.runs, plan.experiment.name)
    typer.echo(f"submitted {submission.name}: `g2rpo status --watch` follows it", err=True)
    return submission


def follow_submission(submission: "Submission") -> None:
    """Shows a submission's state until nothing will happen any more."""
    from reproduce.jobs.display import StatusDisplay

    try:
        with StatusDisplay() as display:
            display.follow(submission)
    except KeyboardInterrupt:
        typer.echo(
            "the jobs go on without this shell; `g2rpo status` shows them, `g2rpo cancel` ends "
            "them, the same command follows them again",
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
    typer.echo(f"runs in the background: `g2rpo status` shows it; its output: {log}", err=True)


def run_again(submission: "Submission", *, only_failed: bool) -> None:
    """Runs what a submission did not finish, from its own inputs, on its own cluster.

    Raises:
        UserError: nothing failed, or it cannot run.
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
    """Writes and prints the table; cells that failed are an error."""
    from reproduce.stages.base import perform
    from slurm.distributed import Ranks

    perform(plan.render, Ranks())
    gaps = plan.render.gaps
    if gaps:
        first = gaps[0]
        where = first.row if first.seed is None else f"{first.row}, seed {first.seed}"
        raise UserError(
            f"{len(gaps)} of {len(plan.cells)} cells failed; the first: {where}: {first.reason}; "
            "run the same command to try them again"
        )
