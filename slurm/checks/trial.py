"""A tiny real job: what only a node can tell.

The job gets the same flags, setup lines and container as a stage does, but one rank and one GPU a
node and a few minutes. What it writes must be seen here: that is how stages tell of their work.
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
from slurm.batch import Batch, python_command, script, setup, srun_arguments
from slurm.checks.finding import Case, Finding
from slurm.checks.probe import ANSWERS, QUESTION, Question
from slurm.cluster import Cluster
from slurm.graph import Needs, Stage
from slurm.states import JobState, ask, cancel_jobs, known_jobs

START_SECONDS = 120
"""How long the trial job may wait for devices."""
RUN_SECONDS = 300
"""How long it may run: importing from a busy file server takes its time."""
SEEN_SECONDS = 30
"""How long a file may take to be seen here: file servers' clients remember what was not there."""
WRITTEN, LOG = "written", "log.txt"
_FINDINGS = TypeAdapter(list[Finding])


def stage_script(cluster: Cluster, kind: str, needs: Needs, results: Path) -> str:
    """The batch script of a kind of stage, as it would be submitted."""
    stage = Stage(name=f"{kind}/check", kind=kind, label="check", resources=needs)
    return script(cluster, Batch("g2rpo/check", (stage,)), results / "check", results)


def trials(case: Case, folder: Path, usable: Mapping[str | None, int]) -> Iterator[Finding]:
    """One trial job for each partition that stages run in.

    Args:
        case: what is checked.
        folder: a folder inside of the results folder.
        usable: how many nodes of each partition jobs can start on.
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
            found = "not submitted: no node of the partition could run it"
            yield Finding("warning", label, found, "fix what the other lines say")
            continue
        place = folder / str(len(done))
        place.mkdir()
        try:
            yield from _run(case, place, Needs(nodes, nodes if needs.gpus else 0), label)
        except UserError as error:
            yield Finding("failed", label, str(error), "fix what the other lines say")


def _run(case: Case, folder: Path, needs: Needs, label: str) -> Iterator[Finding]:
    """Submits the job, waits for it, and says what it found; the job is gone afterwards."""
    question = Question(
        modules=case.modules,
        files=tuple(map(str, case.files)),
        artifacts=case.artifacts,
        gpus=needs.gpus > 0,
        gpu_memory_gb=case.gpu_memory_gb,
        disk_gb=case.disk_gb,
        several=any(each.ranks > 1 for each in case.wanted.values()),
    )
    atomic_write_text(folder / QUESTION, question.model_dump_json())
    case.tell(f"{label}: submitting, and waiting for {START_SECONDS} s at most ...")
    told = ask("sbatch", "--parsable", "--chdir=/", text=_script(case, folder, needs))
    job = told.strip().splitlines()[-1].split(";")[0]
    try:
        state = _wait(job)
    finally:
        cancel_jobs([job])
    if state.state in ("COMPLETED", "FAILED", "RUNNING", "COMPLETING", "TIMEOUT"):
        yield from _told(case, folder, needs, state)
        return
    when = f"did not start within {START_SECONDS} s" if state.active else f"{state.node} cut it off"
    yield Finding("warning", label, f"{when}: {state.words}; nothing was seen there", "try again")


def _script(case: Case, folder: Path, needs: Needs) -> str:
    """The job: a stage's own flags but for output and time, then the probe."""
    cluster = case.cluster
    memory = cluster.memory_gb_per_task
    small = cluster.model_copy(
        update={
            # A small job starts soon; importing torch takes no more.
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
    runtime = f'command -v {kind} || {{ echo "error: {kind} was not found"; exit 1; }}'
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
    """The job when it has ended, or when its time is over."""
    begun = time.monotonic()
    started: float | None = None
    while True:
        state = known_jobs().get(job, JobState(job, "COMPLETED"))  # SLURM forgets jobs in time
        now = time.monotonic()
        if not state.active:
            return state
        if state.state in ("RUNNING", "COMPLETING"):
            started = started or now
        since, patience = (started, RUN_SECONDS) if started else (begun, START_SECONDS)
        if now - since > patience:
            return state
        time.sleep(0.5)


def _told(case: Case, folder: Path, needs: Needs, state: JobState) -> Iterator[Finding]:
    node = state.node or "a node"
    shared = f"the folder {case.results}"
    if not _appears(folder, WRITTEN, 1, SEEN_SECONDS):
        yield Finding(
            "failed",
            shared,
            f"cannot be written to on {node}, or what is written there is not seen here",
            "--results: a folder of a file system that all nodes share",
        )
        return
    yield Finding("ok", shared, f"written to on {node}, seen here")
    # A rank that has written a log and no answer has failed.
    _appears(folder, "*-*.t*", needs.ranks, SEEN_SECONDS)
    if not _appears(folder, ANSWERS, needs.ranks, 3):
        yield Finding(
            "failed",
            "Python in a job",
            f"{state.state.lower()} on {node}: {_last_words(folder) or 'nothing was written'}",
            "setup: or container: of the profile must make the project's Python start",
        )
    elif case.cluster.container.kind != "none":
        container = case.cluster.container
        yield Finding("ok", "container", f"{container.kind} runs {container.image}")
    for path in sorted(folder.glob(ANSWERS)):
        yield from _FINDINGS.validate_json(path.read_text())


def _appears(folder: Path, pattern: str, count: int, seconds: float) -> bool:
    """Whether so many files that are not empty are seen in time."""
    deadline = time.monotonic() + seconds
    while True:
        # Listing the folder has a file server's client look again.
        if sum(path.stat().st_size > 0 for path in folder.glob(pattern)) >= count:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def _last_words(folder: Path) -> str:
    for path in (*sorted(folder.glob("log-*.txt")), folder / LOG):
        if path.exists():
            lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
            told = [line for line in lines if line and not line.startswith("srun: error: ")]
            wrong = [line for line in told if "error" in line.lower()]
            if told:
                return (wrong or told)[-1][:300]
    return ""


@contextmanager
def trial_folder(results: Path) -> Iterator[Path]:
    """A folder inside of ``results`` that is gone afterwards, as are folders made for it.

    Raises:
        OSError: it cannot be made.
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
