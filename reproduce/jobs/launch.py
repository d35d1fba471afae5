"""Starts a plan: on SLURM, on this machine, or in this process."""

import contextlib
import logging
import secrets
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from g2rpo.checksums import hashing_up_to
from g2rpo.config import nearest
from g2rpo.errors import UserError
from g2rpo.lease import Lease
from g2rpo.provenance import git_state
from g2rpo.stop import Stopped, StopRequest
from reproduce.jobs.plan import Plan
from reproduce.jobs.stage_jobs import active_stages, hopeless_stages, submissions_folder
from reproduce.stages.inputs import Inputs
from reproduce.stages.run import ENTRY, run_stage
from slurm import states, submit
from slurm.cluster import Cluster
from slurm.distributed import Ranks
from slurm.graph import Graph, Stage
from slurm.local import LocalRun, Observer, Slots
from slurm.submission import DamagedRecord, Submission, list_submissions, new_folder

logger = logging.getLogger(__name__)
PREPARE = "reproduce.jobs.launch:prepare_worker"
ATTEMPTS = 3
"""Attempts to submit, since a job may end between squeue and sbatch."""
DRIVER = "driver"
"""The lease of the process that runs a submission on this machine."""


def prepare_worker() -> None:
    """Prepares a worker process on this machine."""
    from g2rpo.progress import ProgressReport
    from g2rpo.quiet import quiet_libraries

    quiet_libraries()
    ProgressReport.bars = False
    git_state()  # records the code as imported, not as it is when the stage ends


def new_submission(plan: Plan, cluster: Cluster, folder: Path) -> Submission:
    """The submission of ``plan``, not saved yet."""
    container = cluster.container
    if container.kind != "none":
        # Relative paths in experiments start here, and tables may be elsewhere.
        places = (Path.cwd(), plan.layout.tables.absolute())
        mounts = dict.fromkeys((*container.mounts, *map(str, places)))
        container = container.model_copy(update={"mounts": tuple(mounts)})
        cluster = cluster.model_copy(update={"container": container})
    return Submission(
        folder=folder.absolute(),
        title=f"{plan.experiment.name}, profile {plan.profile.name}",
        entry=ENTRY,
        directory=Path.cwd(),
        cluster=cluster,
        stages=tuple(plan.graph.stages.values()),
        created=time.time(),
        done=plan.done,
    )


def save_submission(plan: Plan, cluster: Cluster) -> Submission:
    """Writes a submission of ``plan``, with everything its jobs need."""
    parent = submissions_folder(plan.layout.runs)
    folder = new_folder(parent, f"{plan.experiment.name}-{plan.profile.name}")
    submission = new_submission(plan, cluster, folder)
    inputs = Inputs(
        folder=submission.folder,
        experiment=plan.experiment,
        profile=plan.profile,
        runs=plan.layout.runs.absolute(),
        tables=plan.layout.tables.absolute(),
    )
    inputs.save(plan.cells)
    submission.save()
    return submission


def left_to_submit(plan: Plan, active: Collection[str]) -> list[Stage]:
    """The stages to run that have no job; the table again if there is any other."""
    left = set(plan.todo.stages) - set(active)
    if left - {plan.render.name}:
        left.add(plan.render.name)
    return [stage for stage in plan.todo.stages.values() if stage.name in left]


def submit_to_slurm(plan: Plan, cluster: Cluster) -> Submission | None:
    """Submits stages that are not done, pending or running; returns None if there are none.

    Raises:
        UserError: SLURM does not answer or rejects a job, or another submission is in progress.
    """
    # Two processes would submit the same stages twice.
    with Lease.acquire(submissions_folder(plan.layout.runs), "lease"), hashing_up_to():
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(submit.DependencyGone):
                return _submit_rest(plan, cluster)
        return _submit_rest(plan, cluster)


def _submit_rest(plan: Plan, cluster: Cluster) -> Submission | None:
    try:
        active = active_stages(plan.layout.runs)
    except UserError as error:
        raise UserError(f"nothing submitted: {error}; run the same command again") from None
    # Checked after asking SLURM: a job may have completed its stage since the plan was made.
    ended = {name for name in plan.todo.stages if name not in active}
    plan = replace(plan, done=plan.done | {n for n in ended if plan.stages[n].is_done()})
    hopeless = hopeless_stages(plan, active)
    states.cancel_jobs(active[name].job for name in hopeless)
    jobs = {name: job.job for name, job in active.items() if name not in hopeless}
    todo = left_to_submit(plan, jobs)
    if not todo:
        return None
    submission = save_submission(plan, cluster)
    submit.submit(submission, todo, jobs)
    return submission


def run_on_this_machine(
    submission: Submission, todo: Graph, jobs: int | None, observer: Observer
) -> None:
    """Runs stages; a failed stage cancels only the stages that need it.

    With ``jobs=1`` and only single-rank stages, they run one by one in this process, so that a
    debugger works; the first error is raised.

    Raises:
        KeyboardInterrupt: interrupted; the running stages have saved.
        Exception: any error of a stage in this process.
    """
    alone = jobs == 1 and all(stage.resources.ranks == 1 for stage in todo.stages.values())
    with Lease.acquire(submission.folder, DRIVER):
        if alone:
            _run_in_this_process(submission, todo, observer)
        else:
            LocalRun(submission, todo, Slots.found(jobs, PREPARE), observer).run()


def _run_in_this_process(submission: Submission, todo: Graph, observer: Observer) -> None:
    try:
        with StopRequest.handle_signals():
            for stage in todo.stages.values():
                observer.started(stage)
                run_stage(submission, stage, Ranks())
                observer.ended(stage, 0)
    except Stopped:
        StopRequest.clear()
        raise KeyboardInterrupt from None


def start_driver(runs_folder: Path, arguments: Sequence[str]) -> Path:
    """Starts ``g2rpo`` with ``arguments`` in the background; it survives a closed shell.

    Returns:
        its log file, once its submission exists.

    Raises:
        UserError: it ended before that.
    """
    folder = submissions_folder(runs_folder)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    log = folder / f"background-{stamp}.log"
    before = set(list_submissions(folder))
    with log.open("x") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "reproduce.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while set(list_submissions(folder)) <= before:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").splitlines()
            raise UserError(f"the background run did not start: {lines[-1] if lines else log}")
        time.sleep(0.2)
    return log


def submission_folders(runs_folder: Path, name: str | None = None) -> list[Path]:
    """The folders of submissions, by experiment or by submission name if given; latest last.

    Raises:
        UserError: there is none.
    """
    parent = submissions_folder(runs_folder)
    folders = list_submissions(parent)
    wanted = [f for f in folders if name in (None, f.name) or f.name.startswith(f"{name}-")]
    if wanted:
        return wanted
    if not folders:
        raise UserError(f"{parent}: no submissions; start one with `g2rpo reproduce --detach`")
    hint = nearest(str(name), (folder.name for folder in folders[-10:]))
    raise UserError(f"no submission {name!r}; {hint}")


def latest_submission(runs_folder: Path, name: str | None = None) -> Submission:
    """The latest submission, by experiment or by submission name if given.

    A damaged one is skipped with a warning.

    Raises:
        UserError: there is none.
    """
    folders = submission_folders(runs_folder, name)
    for folder in reversed(folders):
        try:
            return Submission.load(folder)
        except DamagedRecord as error:
            logger.warning("%s; skipped", error)
    raise UserError(
        f"{folders[-1]}: damaged record; run the same `g2rpo reproduce` to take over its jobs, or "
        f"`g2rpo cancel {folders[-1].name}` to cancel them"
    )
