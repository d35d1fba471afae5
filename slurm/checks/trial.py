"""A tiny real job, for what can only be checked on a node.

It has the flags, setup lines and container of a stage, but one rank and one GPU per node, and a few
minutes. Its files must be visible here: that is how stages report their progress.
"""

import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter

from g2rpo.errors import UserError
from g2rpo.files import atomic_write_text
from slurm.batch import Batch, python_command, setup, srun_arguments
from slurm.checks.finding import Case, Finding
from slurm.checks.probe import ANSWERS, QUESTION
from slurm.cluster import Cluster
from slurm.graph import Needs, Stage
from slurm.states import JobState, ask, cancel_jobs, known_jobs

START_SECONDS = 120
"""How long the trial job may be pending."""
RUN_SECONDS = 300
"""How long it may run: imports from a busy file server are slow."""
SEEN_SECONDS = 30
"""How long a file may take to appear here: NFS clients cache missing names."""
WRITTEN, LOG = "written", "log.txt"
_FINDINGS = TypeAdapter(list[Finding])


def stage_script(cluster: Cluster, kind: str, needs: Needs, results: Path) -> str:
    """The batch script of a kind of stage, exactly as it would be submitted."""
    stage = Stage(name=f"{kind}/check", kind=kind, label="check", resources=needs)
    return Batch(cluster, results / "check", results, "g2rpo/check", (stage,)).script


def trials(case: Case, folder: Path, usable: Mapping[str | None, int]) -> Iterator[Finding]:
    """Runs one trial job in each partition.

    Args:
        case: the case.
        folder: a folder inside the results folder.
        usable: number of usable nodes by partition.
    """
    done: set[str | None] = set()
    for needs in sorted(case.groups, key=lambda needs: (-needs.gpus, -needs.ranks)):
        name = case.cluster.partition_of(needs)
        if name in done:
            continue
        done.add(name)
        label = "trial job" if name is None else f"trial job in {name}"
        nodes = min(2, usable[name], case.cluster.nodes(needs))
        if not nodes:
            found = "not submitted: the partition has no usable node"
            yield Finding("warning", label, found, "fix the other lines first")
            continue
        place = folder / str(len(done))
        place.mkdir()
        try:
            yield from _run(case, place, Needs(nodes, nodes if needs.gpus else 0), label)
        except UserError as error:
            yield Finding("failed", label, str(error), "fix the other lines first")


def _run(case: Case, folder: Path, needs: Needs, label: str) -> Iterator[Finding]:
    """Submits the job, waits for it, reports its findings, and cancels what is left of it."""
    several = any(each.ranks > 1 for each in case.wanted.values())
    question = case.question.model_copy(update={"gpus": needs.gpus > 0, "several": several})
    atomic_write_text(folder / QUESTION, question.model_dump_json())
    case.tell(f"{label}: submitted, waiting up to {START_SECONDS} s ...")
    answer = ask("sbatch", "--parsable", "--chdir=/", text=_script(case, folder, needs))
    job = answer.strip().splitlines()[-1].split(";")[0]
    try:
        state = _wait(job)
    finally:
        cancel_jobs([job])
    if state.state in ("COMPLETED", "FAILED", "RUNNING", "COMPLETING", "TIMEOUT"):
        yield from _report(case, folder, needs, state)
        return
    when = f"did not start within {START_SECONDS} s" if state.active else f"lost on {state.node}"
    yield Finding(
        "warning", label, f"{when}: {state.words}; nothing was checked there", "try again"
    )


def _script(case: Case, folder: Path, needs: Needs) -> str:
    """The job script: a stage's flags except output and time, then the probe."""
    cluster = case.cluster
    memory = cluster.memory_gb_per_task
    small = cluster.model_copy(
        update={
            # A small job starts sooner.
            "cpus_per_task": min(2, cluster.cpus_per_task),
            "memory_gb_per_task": memory and min(8, memory),
            "gpus_per_node": 1,
            "tasks_per_node": 1,
            "exclusive": False,
            "mail": None,
            "signal_lead_seconds": 1,
            "minutes": cluster.minutes.model_copy(update={"render": 10}),
        }
    )
    other = ("--output=", "--error=", "--open-mode=", "--requeue", "--signal=")
    flags = [
        line
        for line in stage_script(small, "render", needs, case.results).splitlines()
        if line.startswith("#SBATCH ") and not line.split()[1].startswith(other)
    ]
    place, log = shlex.quote(str(folder)), shlex.quote(str(folder / LOG))
    output = ("srun", "--unbuffered", "--output", str(folder / "log-%t.txt"))
    run = shlex.join([*output, *srun_arguments(small, case.results)])
    python = python_command(small, case.results, gpus=needs.gpus > 0)
    kind = cluster.container.kind
    runtime = f'command -v {kind} || {{ echo "error: {kind} not found"; exit 1; }}'
    lines = [
        "#!/bin/bash",
        *flags,
        "#SBATCH --output=/dev/null",
        "#SBATCH --no-requeue",
        f"hostname 2>/dev/null >{place}/{WRITTEN} || exit 1",
        f"exec >>{log} 2>&1",
        *setup(small, folder),
        *([runtime] if kind in ("apptainer", "podman") else []),
        "export SUBMITIT_EXECUTOR=slurm",
        f"{run} {python} -m slurm.checks.probe {place}",
    ]
    return "\n".join(lines) + "\n"


def _wait(job: str) -> JobState:
    """Waits until the job has ended or its time is up; returns its state."""
    begun = time.monotonic()
    started: float | None = None
    while True:
        state = known_jobs().get(job, JobState(job, "COMPLETED"))  # SLURM forgets ended jobs
        now = time.monotonic()
        if not state.active:
            return state
        if state.state in ("RUNNING", "COMPLETING"):
            started = started or now
        since, patience = (started, RUN_SECONDS) if started else (begun, START_SECONDS)
        if now - since > patience:
            return state
        time.sleep(0.5)


def _report(case: Case, folder: Path, needs: Needs, state: JobState) -> Iterator[Finding]:
    node = state.node or "a node"
    shared = f"the folder {case.results}"
    if not _appears(folder, WRITTEN, 1, SEEN_SECONDS):
        yield Finding(
            "failed",
            shared,
            f"not writable on {node}, or files written there do not appear here",
            "pass --results on a file system that all nodes share",
        )
        return
    yield Finding("ok", shared, f"written on {node}, visible here")
    # A rank with a log and no answer has failed.
    _appears(folder, "*-*.t*", needs.ranks, SEEN_SECONDS)
    if not _appears(folder, ANSWERS, needs.ranks, 3):
        yield Finding(
            "failed",
            "Python in a job",
            f"{state.state.lower()} on {node}: {_last_words(folder) or 'no output'}",
            "change setup: or container: so that the project's Python starts",
        )
    elif case.cluster.container.kind != "none":
        container = case.cluster.container
        yield Finding("ok", "container", f"{container.kind} runs {container.image}")
    for path in sorted(folder.glob(ANSWERS)):
        yield from _FINDINGS.validate_json(path.read_text())


def _appears(folder: Path, pattern: str, count: int, seconds: float) -> bool:
    """Whether ``count`` non-empty files appear in time."""
    deadline = time.monotonic() + seconds
    while True:
        # Listing the folder makes an NFS client ask the server again.
        if sum(path.stat().st_size > 0 for path in folder.glob(pattern)) >= count:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def _last_words(folder: Path) -> str:
    for path in (*sorted(folder.glob("log-*.txt")), folder / LOG):
        if path.exists():
            lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
            lines = [line for line in lines if line and not line.startswith("srun: error: ")]
            if lines:
                errors = [line for line in lines if "error" in line.lower()]
                return (errors or lines)[-1][:300]
    return ""


@contextmanager
def trial_folder(results: Path) -> Iterator[Path]:
    """A temporary folder inside ``results``; parents created for it are removed as well.

    Raises:
        OSError: it cannot be created.
    """
    made = [folder for folder in (results, *results.parents) if not folder.exists()]
    results.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=results, prefix=".check-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for each in made:
            try:
                each.rmdir()
            except OSError:
                break
