"""``g2rpo status``, ``logs``, ``cancel`` and ``retry``: follow and control submissions."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.config import nearest
from g2rpo.errors import UserError
from reproduce.commands.options import Results

if TYPE_CHECKING:
    from reproduce.jobs.status import StageStatus
    from slurm.submission import Submission

Name = Annotated[
    str | None,
    typer.Argument(help="A submission, or an experiment for its latest one; default: the latest."),
]
OfSubmission = Annotated[
    str | None, typer.Option("--of", help="A submission or an experiment; default: the latest.")
]


def status(
    name: Name = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Update until all stages have ended.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show every stage.")] = False,
    results: Results = Path("results"),
) -> None:
    """Show stages: job, state, node, progress, ETA, restarts, and why they wait or failed.

    Works from any shell.
    """
    from reproduce.commands.run import follow_submission
    from reproduce.jobs.display import print_status
    from reproduce.jobs.launch import latest_submission
    from reproduce.jobs.status import read_status

    submission = latest_submission(results / "runs", name)
    if watch:
        follow_submission(submission)
    print_status(submission, read_status(submission, typer.echo), everything=everything)


def logs(
    stage: Annotated[str, typer.Argument(help="Part of a stage's name, e.g. train or hps/g2rpo.")],
    of: OfSubmission = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines too.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines to print.")] = 50,
    results: Results = Path("results"),
) -> None:
    """Print the log of a stage; if several match, of one that failed or the latest to start."""
    from reproduce.jobs.display import shown_path
    from reproduce.jobs.launch import latest_submission
    from reproduce.jobs.status import read_status

    submission = latest_submission(results / "runs", of)
    statuses = read_status(submission, lambda trouble: typer.echo(trouble, err=True))
    chosen = _chosen(submission, statuses, stage)
    if chosen.log is None:
        raise UserError(
            f"{chosen.stage} has no log yet: it is {chosen.word}"
            + (f" ({chosen.reason})" if chosen.reason else "")
        )
    typer.echo(f"{chosen.stage}: {shown_path(chosen.log)}", err=True)
    _print_tail(chosen.log, lines, follow=follow)


def _chosen(submission: "Submission", statuses: "list[StageStatus]", part: str) -> "StageStatus":
    words = part.split()
    fitting = [
        status
        for status in statuses
        if all(w in f"{status.stage} {status.stage.name}" for w in words)
    ]
    if not fitting:
        names = {str(status.stage) for status in statuses}
        raise UserError(
            f"{submission.name} has no stage {part!r}; {nearest(part, names)}; or name another "
            "submission with --of"
        )
    logged = [status for status in fitting if status.log is not None]
    failed = [status for status in logged if status.word == "failed"]
    started = [status.started for status in logged]
    if failed:
        return failed[0]
    return logged[started.index(max(started))] if logged else fitting[0]


def _print_tail(path: Path, lines: int, *, follow: bool) -> None:
    with path.open(errors="replace") as file:
        for line in file.read().splitlines()[-lines:]:
            typer.echo(line)
        while follow:
            more = file.read()
            if more:
                sys.stdout.write(more)
                sys.stdout.flush()
            time.sleep(1.0)


def cancel(
    name: Name = None,
    results: Results = Path("results"),
) -> None:
    """Cancel the queued and running jobs of a submission; finished work is kept."""
    from reproduce.jobs.launch import submission_folders
    from slurm.submission import DamagedRecord, Submission

    folder = submission_folders(results / "runs", name)[-1]
    try:
        submission = Submission.load(folder)
    except DamagedRecord:  # SLURM knows its jobs
        _cancel_jobs(folder.name, results)
        return
    if submission.cluster.kind == "slurm":
        _cancel_jobs(folder.name, results)
    else:
        _stop_driver(submission)


def _cancel_jobs(name: str, results: Path) -> None:
    """Cancels the jobs of a submission, and lists other submissions that still have jobs."""
    from reproduce.jobs.stage_jobs import own_jobs
    from slurm.states import cancel_jobs, known_jobs

    try:
        jobs = own_jobs(results / "runs", known_jobs())
        mine = jobs.pop(name, [])
        cancel_jobs(mine)
    except UserError as error:
        raise UserError(f"{name}: not cancelled: {error}; run the same command again") from None
    typer.echo(f"{name}: {len(mine)} jobs cancelled")
    place = "" if results == Path("results") else f" --results {results}"
    for other, theirs in jobs.items():
        typer.echo(
            f"still queued: {len(theirs)} jobs of {other}; cancel them with "
            f"`g2rpo cancel {other}{place}`"
        )


def _stop_driver(submission: "Submission") -> None:
    from reproduce.jobs.launch import DRIVER
    from reproduce.jobs.status import driver_lives
    from reproduce.runs.state import latest_attempt

    attempt = latest_attempt(submission.folder / DRIVER)
    if attempt is None or attempt.record is None or not driver_lives(submission):
        typer.echo(f"{submission.name}: not running")
        return
    owner = attempt.record.owner
    if owner.host != os.uname().nodename:
        raise UserError(
            f"{submission.name} runs on {owner.host} as process {owner.pid}; cancel it there"
        )
    os.kill(owner.pid, signal.SIGTERM)  # background processes may ignore SIGINT
    typer.echo(f"{submission.name}: stopping; finished work is kept")


def retry(
    name: Name = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only failed stages and those that depend on them.")
    ] = False,
    results: Results = Path("results"),
) -> None:
    """Submit the unfinished stages of a submission again, with the same inputs and cluster."""
    from reproduce.commands.run import run_again
    from reproduce.jobs.launch import latest_submission

    run_again(latest_submission(results / "runs", name), only_failed=failed)
