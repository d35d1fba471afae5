"""The command line on the cluster: a folder, its tiny experiment, and its results."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from harness import Cluster

from g2rpo.attempts import Attempt, read_attempts
from slurm.submission import Submission, job_groups, list_submissions

ROOT = Path(__file__).resolve().parents[2]
COMMAND_SECONDS = 900
"""Much more than a command takes: importing torch is slow on a machine that has other work."""

CELLS: dict[str, dict[str, Any]] = {
    "base": {},
    "hps/g2rpo": {"method": "g2rpo", "train": ["hps"]},
    # After one step of this size nothing is finite any more.
    "hps/broken": {
        "method": "g2rpo",
        "train": ["hps"],
        "set": {"optimization": {"learning_rate": 1e19}},
    },
}
CLUSTER = {
    "partition": "main",
    "tasks_per_node": 2,
    "cpus_per_task": 1,
    "memory_gb_per_task": 1,
    "signal_lead_seconds": 30,
    "minutes": dict.fromkeys(("embed", "train", "sample", "score", "render"), 20),
    "environment": {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "G2RPO_LEASE_HEARTBEAT_SECONDS": "1",
    },
}


class Workplace:
    """A folder in which commands are run as a user would.

    Args:
        folder: where the YAML files and the results go.
        cluster: the cluster.
        assets: the tiny models.
        cells: keys of :data:`CELLS`.
    """

    def __init__(
        self, folder: Path, cluster: Cluster, assets: Path, cells: Sequence[str] = tuple(CELLS)
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.cluster, self.assets = folder, cluster, assets
        self.runs = folder / "results" / "runs"
        self.path: str | None = None
        table = {"name": "rows", "title": "Rows", "columns": [{"reward": "hps", "label": "HPS"}]}
        if "base" in cells:
            table["baseline"] = "base"
        chosen = {key: {**CELLS[key], "label": key} for key in cells}
        self._write("rows.yaml", {"name": "rows", "cells": chosen, "table": table})
        self.profile(ranks=1)
        self.cluster_profile()

    def _write(self, name: str, content: dict[str, Any]) -> None:
        (self.folder / name).write_text(yaml.safe_dump(content, sort_keys=False))

    def profile(self, ranks: int, iterations: int = 2, shares: int = 1, every: int = 1) -> None:
        """Writes the profile: a training of so many ranks and iterations, cells in shares."""
        profile = {
            "name": "tiny",
            "extends": "smoke",
            "build": None,
            "assets": None,
            "policy": {"source": f"{self.assets}/policy"},
            "prompts": {
                split: f"{self.assets}/prompts/{split}.txt"
                for split in ("train", "validation", "test")
            },
            "rewards": {
                name: {"source": f"{self.assets}/rewards/{name}"}
                for name in ("hps", "clip", "pick_score", "image_reward", "attributes")
            },
            "hardware": {"ranks": ranks, "evaluation_shares": shares},
            "validation_every": 1000,
            "training": {
                "rollout": {"group_size": 3, "prompts_per_iteration": 4},
                "optimization": {"iterations": iterations},
                "checkpoints": {"every": every},
            },
        }
        self._write("tiny.yaml", profile)

    def cluster_profile(self, **changes: Any) -> None:
        """Writes the cluster profile; ``environment`` is laid over, the rest goes before."""
        environment = CLUSTER["environment"] | changes.pop("environment", {})  # type: ignore[operator]
        self._write("here.yaml", {**CLUSTER, **changes, "environment": environment})

    # -- commands ----------------------------------------------------------------------------

    def _command(self, *arguments: str) -> dict[str, Any]:
        environment = os.environ | self.cluster.environment
        environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if self.path is not None:
            environment["PATH"] = f"{self.path}:{environment['PATH']}"
        return {
            "args": [sys.executable, "-m", "reproduce.cli", *arguments],
            "cwd": self.folder,
            "env": environment | {"COLUMNS": "160"},
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
        }

    def g2rpo(self, *arguments: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        """Runs a command to its end; it must leave with ``code``."""
        done: subprocess.CompletedProcess[str] = subprocess.run(
            **self._command(*arguments), timeout=COMMAND_SECONDS, check=False
        )
        assert done.returncode == code, (
            f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Starts a command; SIGINT interrupts it even where these tests run in the background."""
        command = self._command(*arguments)
        command["args"] = ["env", "--default-signal=INT", *command["args"]]
        return subprocess.Popen(**command)

    def request(self, verb: str, *more: str, place: str = "here.yaml") -> tuple[str, ...]:
        """The command line of ``reproduce``, ``submit`` or ``plan`` on the experiment."""
        return (verb, "rows.yaml", "--profile", "tiny.yaml", "--cluster", place, *more)

    def submit(self) -> Submission:
        """Submits the experiment."""
        self.g2rpo(*self.request("reproduce", "--detach"))
        return self.submission()

    # -- what became of it -------------------------------------------------------------------

    def submissions(self) -> list[Submission]:
        """All submissions, the oldest first."""
        return [Submission.load(folder) for folder in list_submissions(self.runs / "submissions")]

    def submission(self) -> Submission:
        """The latest."""
        return self.submissions()[-1]

    def jobs(self, submission: Submission | None = None) -> dict[str, str]:
        """The job of every stage, by kind and label, e.g. ``train hps/g2rpo, seed 1``."""
        chosen = submission or self.submission()
        found = {}
        for group in job_groups(chosen.folder):
            for name in group.stages:
                stage = chosen.graph[name]
                found[f"{stage.kind} {stage.label}"] = group.job_of(name)
        return found

    def job(self, start: str, submission: Submission | None = None) -> str:
        """The job of the one stage whose kind and label begin so."""
        (job,) = (job for name, job in self.jobs(submission).items() if name.startswith(start))
        return job

    def wait_jobs(self, start: str) -> None:
        """Waits until a stage, the last of its submission, has its job."""

        def submitted() -> bool:
            # A submission is there before its jobs are, and another may be older.
            found = self.submissions()
            return bool(found) and any(name.startswith(start) for name in self.jobs(found[-1]))

        self.cluster.wait(submitted, f"job of {start}")

    def alive(self) -> list[str]:
        """The ids of all jobs that wait or run."""
        text = self.cluster.run("squeue", "--array", "--noheader", "--format=%i")
        return text.split()

    def log(self, start: str) -> str:
        """The log of a stage."""
        submission = self.submission()
        path = submission.jobs_folder / f"{self.job(start, submission)}_0_log.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def attempts(self, start: str) -> list[Attempt]:
        """All starts of a stage, as its lease tells them."""
        stages = self.submission().graph.stages.values()
        (lease,) = (Path(s.lease) for s in stages if f"{s.kind} {s.label}".startswith(start))
        return read_attempts(lease.parent, lease.name)

    def wait_iteration(self, start: str, attempt: int, more: int = 1) -> None:
        """Waits until an attempt at a training has done ``more`` iterations of its own."""
        begun: list[int] = []

        def far_enough() -> bool:
            attempts = self.attempts(start)
            if len(attempts) < attempt or attempts[-1].record is None:
                return False
            done = attempts[-1].record.progress.done
            if done is None:
                return False
            begun.append(done)
            return done >= begun[0] + more

        self.cluster.wait(far_enough, f"iteration {more} of attempt {attempt} at {start}")

    def wait_attempt(self, start: str, number: int, state: str) -> None:
        """Waits until an attempt is in ``state``."""

        def reached() -> bool:
            attempts = self.attempts(start)
            return len(attempts) >= number and attempts[number - 1].state == state

        self.cluster.wait(reached, f"attempt {number} at {start} as {state}")

    def trained(self) -> bool:
        """Whether the one training there is has ended."""
        return any(self.runs.glob("g2rpo-*/manifest.json"))

    def weights(self) -> bytes:
        """The trained weights of the one training there is: its newest checkpoint's."""
        (run,) = self.runs.glob("g2rpo-*")
        newest = max(run.glob("checkpoints/iteration-*"))
        return next(newest.glob("transformer/*.safetensors")).read_bytes()

    def held(self, start: str) -> None:
        """Lets the one held job of a stage run."""
        self.cluster.run("scontrol", "release", self.job(start))


def interrupt(process: "subprocess.Popen[str]", number: int = signal.SIGKILL) -> tuple[str, str]:
    """Ends a command by a signal; what it wrote."""
    process.send_signal(number)
    return process.communicate(timeout=COMMAND_SECONDS)


def without_ids(script: str, submission: str) -> str:
    """A batch script without what only a submission has: its name, and the ids of jobs."""
    text = script.replace(submission, "SUBMISSION")
    text = re.sub(r"(?m)^(#SBATCH --comment='?g2rpo/SUBMISSION/)\w+", r"\1NUMBER", text)
    return re.sub(
        r"(?m)^#SBATCH --dependency=.*$",
        # A name in angle brackets is quoted, a number is not.
        lambda line: re.sub(r":(?:<[^>]*>|\d+)", ":ID", line.group()).replace("'", ""),
        text,
    ).strip()


def slow_sbatch(folder: Path, seconds: float) -> str:
    """A folder for the path whose ``sbatch`` answers late, when the job is there already."""
    folder.mkdir()
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True)
    shim = folder / "sbatch"
    shim.write_text(
        f'#!/bin/bash\n{real.stdout.strip()} "$@"\ncode=$?\nsleep {seconds}\nexit $code\n'
    )
    shim.chmod(0o755)
    return str(folder)


def wait_exit(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """The exit code of a command and what it wrote."""
    out, err = process.communicate(timeout=COMMAND_SECONDS)
    return process.returncode, out, err
