"""The SLURM jobs of a results folder: which stage each one runs, across all submissions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from g2rpo.errors import UserError
from reproduce.jobs.plan import Plan
from reproduce.stages.inputs import Inputs
from reproduce.stages.run import load_stage
from slurm import states
from slurm.states import JobState, array_of
from slurm.submission import Submission, job_groups, list_submissions, read_comment


def submissions_folder(runs_folder: Path) -> Path:
    """The folder of all submissions."""
    return runs_folder / "submissions"


@dataclass(frozen=True)
class StageJob:
    """The SLURM job of a stage.

    Attributes:
        job: its id, with the array index where it has one.
        comment: names its submission, see :func:`slurm.submission.job_comment`.
        state: its state in SLURM; None if SLURM does not know it or was not asked.
    """

    job: str
    comment: str
    state: JobState | None = None

    @property
    def submission(self) -> str:
        """The name of the submission that it belongs to."""
        return self.comment.split("/")[1]

    @property
    def active(self) -> bool:
        """Whether it is pending, running, or will run again."""
        return self.state is not None and self.state.active

    @property
    def waiting(self) -> bool:
        """Whether it is pending, for its first start or a restart."""
        return self.state is not None and self.state.state == "PENDING"

    @property
    def rank(self) -> tuple[bool, int]:
        """Of two jobs of a stage, the higher one represents it: the active one, else the newer."""
        return self.active, int(array_of(self.job))


def own_jobs(runs_folder: Path, known: Mapping[str, JobState]) -> dict[str, list[str]]:
    """The pending and running jobs of a results folder, by submission.

    ``known`` are the jobs that squeue lists (:func:`slurm.states.known_jobs`).
    """
    parent = submissions_folder(runs_folder)
    found: dict[str, list[str]] = {}
    for job, state in known.items():
        start, _, rest = state.comment.partition("/")
        name, more, _ = rest.partition("/")
        if state.active and start == "g2rpo" and more and (parent / name).is_dir():
            found.setdefault(name, []).append(job)
    return found


def stage_jobs(runs_folder: Path, known: Mapping[str, JobState]) -> dict[str, StageJob]:
    """The job of each stage of a results folder, from any submission.

    A pending or running job if there is one, else the latest. Jobs are identified by their comment,
    so a shell killed right after sbatch, a damaged record, or job ids that a new cluster reuses do
    no harm. ``known`` are the jobs that squeue lists; empty if it is unreachable.
    """
    parent = submissions_folder(runs_folder)
    found: dict[str, StageJob] = {}
    for folder in list_submissions(parent):
        for group in job_groups(folder):
            found |= {s: StageJob(group.job_of(s), group.comment) for s in group.stages}
    for job, state in known.items():
        submission, stages = read_comment(state.comment) or ("", ())
        if not (parent / submission).is_dir():
            continue
        index = job.partition("_")[2] if len(stages) > 1 else "0"
        # An array whose tasks were cancelled one by one is left as an id without an index.
        if not index.isdecimal() or int(index) >= len(stages):
            continue
        stage, made = stages[int(index)], StageJob(job, state.comment, state)
        found[stage] = max(made, found.get(stage, made), key=lambda each: each.rank)
    return found


def with_ends(jobs: Mapping[str, StageJob], known: Mapping[str, JobState]) -> dict[str, StageJob]:
    """``jobs`` with the final state of those that have ended; ``known`` is what squeue lists."""
    comments = {array_of(job): state.comment for job, state in known.items()}
    # A reused id says nothing about the job that had it before.
    asked = {
        job.job
        for job in jobs.values()
        if not job.active and comments.get(array_of(job.job), job.comment) == job.comment
    }
    ended = states.ended_jobs(asked, known)
    return {
        stage: job if job.active else replace(job, state=ended.get(job.job))
        for stage, job in jobs.items()
    }


def active_stages(runs_folder: Path) -> dict[str, StageJob]:
    """The pending and running jobs of this results folder, by stage.

    Raises:
        UserError: SLURM does not answer.
    """
    jobs = stage_jobs(runs_folder, states.known_jobs())
    return {stage: job for stage, job in jobs.items() if job.active}


def hopeless_stages(plan: Plan, active: Mapping[str, StageJob]) -> set[str]:
    """The stages of ``plan`` whose pending job depends on a failed, cancelled or missing one.

    SLURM cancels such a job eventually, or runs it once it has forgotten the other job. A pending
    job whose submission cannot be read is included as well: it would fail when it starts.
    """
    parent, done = submissions_folder(plan.layout.runs), plan.done
    waiting = {n: job for n, job in active.items() if n in plan.todo.stages and job.waiting}
    never = "DependencyNeverSatisfied"
    hopeless = {n for n, job in waiting.items() if job.state and job.state.reason == never}
    for folder in {parent / job.submission for job in waiting.values()}:
        mine = {name for name, job in waiting.items() if job.submission == folder.name}
        try:
            submission = Submission.load(folder)
            inputs = Inputs.load(folder)
        except UserError:
            hopeless |= mine
            continue
        left = submission.graph.without(submission.done | done)
        lost = {
            name
            for name, stage in left.stages.items()
            if name not in active and not load_stage(inputs, stage).is_done()
        }
        hopeless |= left.downstream(lost) & mine
    return plan.graph.downstream(hopeless) & waiting.keys()
