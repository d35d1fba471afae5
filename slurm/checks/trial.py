"""A tiny real job, for what can only be checked on a node.

It has the flags, setup lines and container of a stage, but one rank and one GPU per node, and a few
minutes. Its files must be visible here: that is how stages report their progress.
"""

import shlex
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter

from g2rpo.errors import UserError
from g2rpo.files import atomic_write_text
from slurm.batch import Batch, python_command
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
LOGS = "*_log.*"
"""SLURM itself writes them, before anything of the profile runs."""
_FINDINGS = TypeAdapter(list[Finding])


def stage_script(cluster: Cluster, kind: str, needs: Needs, results: Path) -> str:
    """The batch script of a kind of stage, exactly as it would be submitted."""
    stage = Stage(name=f"{kind}/check", kind=kind, label="check", resources=needs)
    return Batch(cluster, results / "check", results, "g2rpo/check", (stage,)).script()


def trials(case: Case, folder: Path, usable: Collection[str | None]) -> Iterator[Finding]:
    """Runs one trial job in each of the ``usable`` partitions; ``folder`` is inside the results."""
    done: set[str | None] = set()
    for needs in sorted(case.groups, key=lambda needs: (-needs.gpus, -needs.ranks)):
        name = case.cluster.partition_of(needs)
        if name in done:
            continue
        done.add(name)
        label = "trial job" if name is None else f"trial job in {name}"
        if name not in usable:
            found = "not submitted: the partition has no usable node"
            yield Finding("warning", label, found, "fix the other lines first")
            continue
        place = folder / str(len(done))
        place.mkdir()
        nodes = min(2, case.cluster.nodes(needs))
        try:
            yield from _run(case, place, Needs(nodes, nodes if needs.gpus else 0), label)
        except UserError as error:
            yield Finding("failed", label, str(error), "fix the other lines first")


def _run(case: Case, folder: Path, needs: Needs, label: str) -> Iterator[Finding]:
    """Submits the job, waits for it, reports its findings, and cancels what is left of it."""
    several = any(each.ranks > 1 for each in case.wanted.values())
    question = case.question.model_copy(update={"gpus": min(1, needs.gpus), "several": several})
    atomic_write_text(folder / QUESTION, question.model_dump_json())
    job = ask("sbatch", "--parsable", "--chdir=/", text=_script(case, folder, needs))
    case.tell(f"{label}: submitted, waiting up to {START_SECONDS} s ...")
    job = job.strip().splitlines()[-1].split(";")[0]
    try:
        state = _wait(job)
    finally:
        cancel_jobs([job])
    if state.state in ("COMPLETED", "FAILED", "RUNNING", "COMPLETING", "TIMEOUT"):
        yield from _report(case, folder, needs, state)
        return
    when = f"did not start within {START_SECONDS} s" if state.active else f"lost on {state.node}"
    found = f"{when}: {state.words}; nothing was checked there"
    yield Finding("warning", label, found, "try again")


def _script(case: Case, folder: Path, needs: Needs) -> str:
    """The batch script of a small, short stage that runs the probe."""
    cluster, memory = case.cluster, case.cluster.memory_gb_per_task
    small = cluster.model_copy(
        update={
            "cpus_per_task": min(2, cluster.cpus_per_task),
            "memory_gb_per_task": memory and min(8, memory),
            "gpus_per_node": 1,
            "tasks_per_node": 1,
            "exclusive": False,
            "mail": None,
            "max_restarts": 0,
            "signal_lead_seconds": 1,
            "minutes": cluster.minutes.model_copy(update={"render": 10}),
        }
    )
    stage = Stage("render/check", "render", "check", resources=needs)
    python = python_command(small, case.results, gpus=needs.gpus > 0)
    batch = Batch(small, folder, case.results, "g2rpo/check", (stage,))
    return batch.script(f"{python} -m slurm.checks.probe {shlex.quote(str(folder))}")


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
    if not _appears(folder, LOGS, 1, SEEN_SECONDS):
        yield Finding(
            "failed",
            shared,
            f"not writable on {node}, or files written there do not appear here",
            "pass --results on a file system that all nodes share",
        )
        return
    yield Finding("ok", shared, f"written on {node}, visible here")
    if not _appears(folder, ANSWERS, needs.ranks, SEEN_SECONDS):
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
    """Whether ``count`` files appear in time."""
    deadline = time.monotonic() + seconds
    while True:
        # Listing the folder makes an NFS client ask the server again.
        if len(list(folder.glob(pattern))) >= count:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def _last_words(folder: Path) -> str:
    """The last error in the job's logs, else their last line."""
    texts = [path.read_text(errors="replace") for path in sorted(folder.glob(LOGS))]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("srun: error:", "submitit"))] or lines
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1][:300]


@contextmanager
def trial_folder(results: Path) -> Iterator[Path]:
    """A temporary folder inside ``results``, which is created if it does not exist.

    Raises:
        OSError: it cannot be created.
    """
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=results, prefix=".check-", ignore_cleanup_errors=True
    ) as name:
        yield Path(name)
