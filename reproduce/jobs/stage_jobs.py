"""The jobs of a results folder in SLURM: which stage each runs, for whichever submission."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from g2rpo.errors import UserError
from reproduce.jobs.plan import Plan
from reproduce.stages.inputs import Inputs
from reproduce.stages.run import load_stage
from slurm import states
from slurm.states import JobState, array_of
from slurm.submission import (
    OtherVersion,
    Submission,
    job_groups,
    list_submissions,
    read_comment,
)


def submissions_folder(runs_folder: Path) -> Path:
    """Where submissions are kept."""
    return runs_folder / "submissions"


@dataclass(frozen=True)
class StageJob:
    """The SLURM job of a stage.

    Attributes:
        job: its id, with the array index where it has one.
        comment: names its submission, see :func:`slurm.submission.job_comment`.
        state: what SLURM says of it; None where it knows nothing, or was not asked.
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
        """Whether it waits, runs, or will run again."""
        return self.state is not None and self.state.active

    @property
    def waiting(self) -> bool:
        """Whether it has not started, or waits to start again."""
        return self.state is not None and self.state.state == "PENDING"

    def precedes(self, other: "StageJob") -> bool:
        """Whether ``other`` tells more of the stage: it is alive, or was submitted later."""
        mine, others = ((j.active, int(array_of(j.job))) for j in (self, other))
        return mine <= others


def own_jobs(runs_folder: Path, known: Mapping[str, JobState]) -> dict[str, list[str]]:
    """The jobs of a results folder that wait or run, by the name of their submission.

    Args:
        runs_folder: where its runs are.
        known: what squeue lists (:func:`slurm.states.known_jobs`).
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
    """The job of each stage of a results folder, whichever submission it belongs to.

    That is one that waits or runs, else the latest. Jobs are known by the comment that they were
    submitted with, so neither a shell that was killed right after sbatch, nor a damaged record, nor
    ids that a new cluster gives again can mislead.

    Args:
        runs_folder: where its runs are.
        known: what squeue lists (:func:`slurm.states.known_jobs`); empty where it does not answer.
    """
    parent = submissions_folder(runs_folder)
    groups: dict[str, tuple[str, ...]] = {}
    found: dict[str, StageJob] = {}
    for folder in list_submissions(parent):
        for group in job_groups(folder):
            groups[group.comment] = group.stages
            jobs = ((stage, group.job_of(stage)) for stage in group.stages)
            found |= {stage: StageJob(job, group.comment) for stage, job in jobs if job is not None}
    for job, state in known.items():
        named = read_comment(state.comment)
        stages = groups.get(state.comment, ())
        if not stages and named is not None and (parent / named[0]).is_dir():
            stages = named[1]
        index = job.partition("_")[2] if len(stages) > 1 else "0"
        # What is left of an array whose tasks were cancelled one by one has no index any more.
        if not index.isdecimal() or int(index) >= len(stages):
            continue
        stage, made = stages[int(index)], StageJob(job, state.comment, state)
        if stage not in found or found[stage].precedes(made):
            found[stage] = made
    return found


def with_ends(jobs: Mapping[str, StageJob], known: Mapping[str, JobState]) -> dict[str, StageJob]:
    """``jobs`` with how those ended that neither wait nor run; ``known`` is what squeue lists."""
    comments = {array_of(job): state.comment for job, state in known.items()}
    # An id that was given again says nothing of the job that had it before.
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
    """The jobs that wait or run for stages of this results folder, by stage.

    Raises:
        UserError: SLURM does not answer.
    """
    jobs = stage_jobs(runs_folder, states.known_jobs())
    return {stage: job for stage, job in jobs.items() if job.active}


def hopeless_stages(plan: Plan, active: Mapping[str, StageJob]) -> set[str]:
    """The stages of ``plan`` whose job waits for one that failed, was cancelled, or never came.

    SLURM cancels such a job in its own time, or lets it run where it has forgotten the other, so
    until then it looks as if it would still do its stage. One whose submission cannot be read any
    more would fail when it starts.
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
        except OtherVersion:  # its jobs run the code that wrote it
            continue
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
