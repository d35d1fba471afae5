"""A tiny real job, and SLURM's own word on the jobs that would be submitted.

The job gets the same flags, setup lines and container as a stage does, but one rank and one GPU a
node and a few minutes. What it writes must be seen here: that is how stages tell of their work.
"""

import json
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g2rpo.errors import UserError
from g2rpo.files import write_json
from slurm.batch import Batch, python_command, script, setup, srun_arguments
from slurm.doctor.answers import judged
from slurm.doctor.finding import Case, Finding, listed
from slurm.doctor.probe import ANSWERS, QUESTION
from slurm.doctor.site import ask, fields
from slurm.graph import Needs, Stage
from slurm.states import REASONS

START_SECONDS = 120
"""How long the trial job may wait for devices."""
RUN_SECONDS = 300
"""How long it may run: importing from a busy file server takes its time."""
SEEN_SECONDS = 30
"""How long a file may take to be seen here: file servers' clients remember what was not there."""
UNWRITABLE, NO_RUNTIME = 71, 72
"""Exit codes of the trial job's own lines."""
WRITTEN, LOG = "written", "log.txt"
_WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
_CUT_OFF = {
    "CANCELLED": "was cancelled",
    "PREEMPTED": "was preempted",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not boot",
}
_RUNS = {"RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"}


def verdicts(case: Case) -> Iterator[Finding]:
    """What ``sbatch --test-only`` says of the batch script of each kind of stage."""
    for needs, kinds in case.groups.items():
        what = f"sbatch takes {listed(kinds, 8)}"
        # The longest kind is the hardest to take.
        kind = max(kinds, key=case.cluster.time_limit)
        try:
            text = _script(case, kind, needs)
            told = ask("sbatch", "--test-only", text=text).strip().splitlines()
        except UserError as error:
            found = str(error).removeprefix(f"cluster {case.cluster.name}: ")
            yield Finding("failed", what, found, "mend what the other lines tell, or the profile")
            continue
        start = re.search(r"to start at .*", told[-1]) if told else None
        yield Finding("ok", what, f"would {start[0][3:]}" if start else "yes")


def _script(case: Case, kind: str, needs: Needs) -> str:
    stage = Stage(name=f"{kind}/doctor", kind=kind, label="doctor", resources=needs)
    batch = Batch("g2rpo/doctor", (stage,))
    jobs = case.results / "doctor"
    return script(case.cluster, batch, jobs, case.results)


@dataclass(frozen=True)
class Trial:
    """One job.

    Attributes:
        case: what is examined.
        folder: where it writes, inside of the results folder.
        needs: its devices: one rank, or one GPU, on each node.
    """

    case: Case
    folder: Path
    needs: Needs

    @property
    def label(self) -> str:
        """What people call it."""
        name = self.case.partition(self.needs)
        return "trial job" if name is None else f"trial job in {name}"

    def script(self) -> str:
        """The job: a stage's own flags but for output and time, then the trial."""
        memory = self.case.cluster.memory_gb_per_task
        small = self.case.cluster.model_copy(
            update={
                # A small job starts soon; importing torch takes no more.
                "cpus_per_task": min(2, self.case.cluster.cpus_per_task),
                "memory_gb_per_task": memory and min(8, memory),
                "gpus_per_node": 1,
                "tasks_per_node": 1,
                "exclusive": False,
                "mail": None,
                "signal_lead_seconds": 1,
                "minutes": self.case.cluster.minutes.model_copy(update={"render": 10}),
            }
        )
        text = _script(Case(small, {}, self.case.results), "render", self.needs)
        other = ("--output=", "--error=", "--open-mode=", "--requeue", "--signal=")
        flags = [
            line
            for line in text.splitlines()
            if line.startswith("#SBATCH ") and not line.split()[1].startswith(other)
        ]
        folder = shlex.quote(str(self.folder))
        log = shlex.quote(str(self.folder / LOG))
        run = shlex.join(
            [
                *("srun", "--unbuffered", "--output", str(self.folder / "log-%t.txt")),
                *srun_arguments(small, self.case.results),
            ]
        )
        python = python_command(small, self.case.results, gpus=self.needs.gpus > 0)
        lines = [
            "#!/bin/bash",
            *flags,
            "#SBATCH --output=/dev/null",
            "#SBATCH --no-requeue",
            f"hostname 2>/dev/null >{folder}/{WRITTEN} || exit {UNWRITABLE}",
            f"exec >>{log} 2>&1",
            *setup(small, self.folder),
            *self._runtime(),
            "export SUBMITIT_EXECUTOR=slurm",
            f"{run} {python} -m slurm.doctor.probe {folder}",
        ]
        return "\n".join(lines) + "\n"

    def _runtime(self) -> list[str]:
        kind = self.case.cluster.container.kind
        if kind in ("none", "pyxis"):
            return []
        return [f"command -v {kind} || exit {NO_RUNTIME}"]

    def run(self) -> list[Finding]:
        """Submits the job, waits for it, and tells what it found; the job is gone afterwards."""
        options = self.case.options
        write_json(
            self.folder / QUESTION,
            {
                "files": [str(path) for path in options.files],
                "modules": list(options.modules),
                "artifacts": list(options.artifacts),
                "gpus": self.needs.gpus,
            },
        )
        options.tell(f"{self.label}: submitting, and waiting for {START_SECONDS} s at most ...")
        try:
            told = ask("sbatch", "--parsable", "--chdir=/", text=self.script())
        except UserError as error:
            found = f"SLURM does not take it: {error}"
            return [Finding("failed", self.label, found, "mend what the other lines tell")]
        job = told.strip().splitlines()[-1].split(";")[0]
        try:
            state = self._wait(job)
        finally:
            _cancel(job)
        if state["JobState"] in _WAITS:
            return [self._waiting(state)]
        return list(self._told(state))

    def _wait(self, job: str) -> dict[str, str]:
        """What SLURM says of the job when it has ended, or when its time is over."""
        begun = time.monotonic()
        started: float | None = None
        while True:
            state = _state(job)
            now = time.monotonic()
            word = state.get("JobState", "UNKNOWN")
            if word in _WAITS:
                if now - begun > START_SECONDS:
                    return state
            elif word in _RUNS:
                started = started or now
                if now - started > RUN_SECONDS:
                    return state
            else:
                return state
            time.sleep(0.5)

    def _waiting(self, state: dict[str, str]) -> Finding:
        reason = state.get("Reason", "")
        words = REASONS.get(reason.split(",")[0], reason.replace("_", " ") or "waiting")
        return Finding(
            "warning",
            self.label,
            f"did not start within {START_SECONDS} s: {words}; "
            "what is seen from a node was not looked at",
            "try again when the cluster is less busy",
        )

    def _told(self, state: dict[str, str]) -> Iterator[Finding]:
        node = state.get("NodeList", "a node")
        if state["JobState"] in _CUT_OFF:
            found = f"{_CUT_OFF[state['JobState']]} on {node} before it could tell anything"
            yield Finding("warning", self.label, found, "try again")
            return
        code = state.get("ExitCode", "0:0").split(":")[0]
        results = self.case.results
        shared = f"the folder {results}"
        if code == str(UNWRITABLE):
            yield Finding(
                "failed",
                shared,
                f"cannot be written to on {node}",
                "--results: a folder of a file system that all nodes share",
            )
            return
        if not _seen(self.folder / WRITTEN):
            yield Finding(
                "failed",
                shared,
                f"what was written on {node} is not seen here ({state['JobState'].lower()})",
                "--results: a folder of a file system that all nodes share",
            )
            return
        yield Finding("ok", shared, f"written to on {node}, seen here")
        kind = self.case.cluster.container.kind
        if code == str(NO_RUNTIME):
            mend = f"setup: load its module, or another container.kind than {kind}"
            yield Finding("failed", "container", f"{kind} was not found on {node}", mend)
            return
        answers = self._answers()
        if len(answers) < max(1, self.needs.ranks):
            word = state["JobState"].lower()
            yield Finding(
                "failed",
                "Python in a job",
                f"{word} on {node}: {self._last_words() or 'nothing was written'}",
                "setup: or container: of the profile must make the project's Python start",
            )
        elif kind != "none":
            yield Finding("ok", "container", f"{kind} runs {self.case.cluster.container.image}")
        for answer in answers:
            yield from judged(self.case, self.needs, answer)

    def _answers(self) -> list[dict[str, Any]]:
        deadline = time.monotonic() + SEEN_SECONDS
        while True:
            found = sorted(self.folder.glob(ANSWERS))
            if len(found) >= self.needs.ranks or time.monotonic() > deadline:
                return [json.loads(path.read_text()) for path in found]
            if any((self.folder / f"log-{rank}.txt").exists() for rank in range(self.needs.ranks)):
                deadline = min(deadline, time.monotonic() + 3)
            time.sleep(0.5)

    def _last_words(self) -> str:
        for path in (*sorted(self.folder.glob("log-*.txt")), self.folder / LOG):
            if path.exists():
                lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
                told = [line for line in lines if line and not line.startswith("srun: error: ")]
                wrong = [line for line in told if "error" in line.lower()]
                if told:
                    return (wrong or told)[-1][:300]
        return ""


def _state(job: str) -> dict[str, str]:
    try:
        return fields(ask("scontrol", "show", "job", "--oneliner", job))
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        return {"JobState": "ENDED"}  # long enough ago for SLURM to have forgotten it


def _seen(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.exists() or not path.stat().st_size:
        if time.monotonic() > deadline:
            return False
        list(path.parent.iterdir())  # has a file server's client look again
        time.sleep(0.5)
    return True


def _cancel(job: str) -> None:
    try:
        ask("scancel", job)
    except UserError:
        return  # it has ended


@contextmanager
def trial_folder(results: Path) -> Iterator[Path]:
    """A folder inside of ``results`` that is gone afterwards, as are folders made for it.

    Raises:
        OSError: it cannot be made.
    """
    made = [folder for folder in (results, *results.parents) if not folder.exists()]
    results.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=results, prefix=".doctor-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for each in made:
            try:
                each.rmdir()
            except OSError:
                break


def trials(case: Case, folder: Path, usable: Mapping[str | None, int]) -> Iterator[Finding]:
    """One trial job for each partition that stages run in.

    Args:
        case: what is examined.
        folder: a folder inside of the results folder.
        usable: how many nodes of each partition jobs can start on.
    """
    done: set[str | None] = set()
    for needs in sorted(case.groups, key=lambda needs: (-needs.gpus, -needs.ranks)):
        name = case.partition(needs)
        if name in done:
            continue
        done.add(name)
        count = min(2, usable[name], case.cluster.nodes(needs))
        trial = Trial(case, folder / str(len(done)), Needs(count, count if needs.gpus else 0))
        if not count:
            found = "not submitted: no node of the partition could run it"
            yield Finding("warning", trial.label, found, "mend what the other lines tell")
            continue
        trial.folder.mkdir()
        try:
            yield from trial.run()
        except UserError as error:
            yield Finding("failed", trial.label, str(error), "does `scontrol ping` answer?")
