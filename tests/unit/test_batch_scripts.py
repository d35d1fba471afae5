"""The batch scripts of every kind of stage and site, verbatim; together they show every setting.

After an intended change, run this file with ``G2RPO_REWRITE_SCRIPTS=1`` set to update
``tests/unit/sbatch/``, and review the difference before committing it.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from g2rpo.config import validate
from slurm import batch
from slurm.batch import REPOSITORY
from slurm.cluster import Cluster
from slurm.graph import Graph, Needs, Stage
from slurm.job import REQUEUE
from slurm.submission import Submission, job_comment, read_comment
from slurm.submit import dependency, scripts

GOLDEN = Path(__file__).with_name("sbatch")
RESULTS = Path("/RESULTS")

ONE_GPU = [Stage("sample/a", "sample", "a", resources=Needs(1, 1))]
TRAINING = [Stage("train/a", "train", "a", resources=Needs(16, 16))]
CPU = [Stage("render/a", "render", "a")]
SHARES = [
    Stage("train/a", "train", "a", resources=Needs(16, 16)),
    Stage("embed/a", "embed", "a", resources=Needs(1, 1)),
    *(
        Stage(
            f"sample/a/{index}",
            "sample",
            f"a, {index + 1}/8",
            needs=("train/a", "active"),
            after=("embed/a",),
            resources=Needs(1, 1),
            array="sample/a",
        )
        for index in range(8)
    ),
]
ACTIVE = Stage("active", "train", "submitted before", resources=Needs(16, 16))
IMAGE: dict[str, Any] = {"image": "/images/g2rpo.sif", "mounts": ["/weights", "/data:/inside"]}

CASES: dict[str, tuple[list[Stage], dict[str, Any]]] = {
    "training": (TRAINING, {
        "partition": "gpu", "account": "project", "qos": "normal", "constraint": "a100-80g",
        "memory_gb_per_task": 120, "gpu_flag": "gres", "gpu_type": "a100", "exclusive": True,
        "max_restarts": 3, "signal_lead_seconds": 600, "minutes": {"train": 240},
        "mail": {"user": "me@example.org", "events": ["FAIL", "TIME_LIMIT"]},
        "extra": {"reservation": "a course", "nice": 100, "reboot": True},
    }),
    "array": (SHARES, {"array_parallelism": 4, "gpu_type": "h100"}),
    "cpu": (CPU, {"partition": "gpu", "cpu_partition": "cpu", "constraint": "a100-80g",
                  "exclusive": True, "memory_gb_per_task": 4}),
    "apptainer": (ONE_GPU, {"container": {"kind": "apptainer", "arguments": ["--no-home"], **IMAGE},
                            "setup": ["module purge", "module load apptainer"],
                            "environment": {"HF_HOME": "/shared/hub of all",
                                            "MASTER_PORT": "29501"}}),
    "pyxis": (TRAINING, {"container": {"kind": "pyxis", "arguments": ["--container-writable"],
                                       **IMAGE, "image": "registry.example.org#g2rpo:1"}}),
    "podman": (ONE_GPU, {"container": {"kind": "podman", "arguments": ["--device", "all GPUs"],
                                       **IMAGE}, "environment": {"HF_HOME": "/weights"}}),
}  # fmt: skip


def submission_of(stages: list[Stage], settings: dict[str, Any]) -> Submission:
    cluster = validate(Cluster, {"name": "test", **settings}, "test")
    folder = RESULTS / "submissions" / "table1-flux"
    known = Graph([ACTIVE, *stages])
    return Submission(
        folder=folder, title="a title", entry="module:run", directory=Path("/"), cluster=cluster,
        stages=tuple(known.stages.values()), created=0.0,
    )  # fmt: skip


def text_of(name: str) -> str:
    stages, settings = CASES[name]
    names, text = scripts(submission_of(stages, settings), stages, {"active": "4711"})[-1]
    text = f"# {', '.join(names)}\n{text}\n"
    # The interpreter first: it may be inside of the repository.
    return text.replace(sys.executable, "PYTHON").replace(str(REPOSITORY), "REPOSITORY")


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_recorded_one(name: str) -> None:
    path, text = GOLDEN / f"{name}.sh", text_of(name)
    if os.environ.get("G2RPO_REWRITE_SCRIPTS"):
        path.write_text(text)
    assert text == path.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_of_an_older_array_only_the_tasks_that_are_needed_are_waited_for() -> None:
    needing = Stage("score", "score", "a", needs=("s/0", "s/1", "s/2", "done"), after=("t",))
    # 21 was submitted before, and one of its tasks has failed; 28 does that one again.
    jobs = {"s/0": "28", "s/1": "21_1", "s/2": "21_2", "t": "9"}
    assert dependency([needing, needing], jobs) == "afterok:28:21_1:21_2,afterany:9"
    assert dependency([needing], {"s/0": "28", "s/1": "28"}) == "afterok:28"
    assert dependency([needing], {}) is None


def test_the_comment_says_which_stages_a_job_runs() -> None:
    array = tuple(f"score/g2rpo-0123456789ab/e0/{n:03d}-of-064" for n in range(64))
    for stages in (array, array[7:9], array[:1], ("render/flux/table1",), ("a", "b")):
        comment = job_comment("table1-flux-20260101-000000-ab12", "0a1b2c3d", stages)
        assert len(comment) <= 1024  # SLURM takes no more
        assert read_comment(comment) == ("table1-flux-20260101-000000-ab12", stages)
    for other in ("", "(null)", "g2rpo/doctor", "g2rpo/table1-flux-x/0a1b", "mine/x/0a/train/a"):
        assert read_comment(other) is None


def test_a_long_array_is_submitted_in_parts() -> None:
    share = replace(SHARES[2], needs=(), after=())
    shares = [replace(share, name=f"sample/a/{index:03d}") for index in range(130)]
    made = scripts(submission_of(shares, {}), shares, {})
    assert [len(stages) for stages, _ in made] == [64, 64, 2]
    assert [name for stages, _ in made for name in stages] == [s.name for s in shares]


AWAY = 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1'
NO_JOB = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'


def after_a_job(folder: Path, code: int, answers: dict[str, list[str]]) -> tuple[int, list[str]]:
    """Runs the lines after a job's command; the exit code, and the commands of SLURM.

    ``answers`` has a shell line for each call of a command, the last one for the rest.
    """
    (folder / "sleep").write_text("#!/bin/bash\n")
    for name, lines in answers.items():
        cases = "\n".join(f"{n}) {line} ;;" for n, line in enumerate(lines[:-1], start=1))
        (folder / name).write_text(
            f'#!/bin/bash\necho "{name} $*" >>{folder}/calls\n'
            f"case $(grep -c '^{name}' {folder}/calls) in\n{cases}\n*) {lines[-1]} ;;\nesac\n"
        )
    for path in folder.iterdir():
        path.chmod(0o755)
    for tool in ("bash", "grep", "rm", "tail", "timeout"):  # no SLURM that may be installed here
        (folder / tool).symlink_to(str(shutil.which(tool)))
    marker = folder / "marker"
    if code == REQUEUE:
        marker.touch()
    script = [f"job=17 marker={marker}", f"(exit {code})", *batch.teardown(3)]
    command = ["bash", "-c", "\n".join(script)]
    done = subprocess.run(command, env={"PATH": str(folder)}, timeout=600, check=False)
    assert not marker.exists()
    calls = folder / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(
    ("code", "answers", "requeued"),
    [
        (REQUEUE, {"squeue": ["echo RUNNING"], "scontrol": ["exit 0"]}, 1),
        (REQUEUE, {"squeue": ["echo warning >&2; echo RUNNING"], "scontrol": [AWAY, "exit 0"]}, 2),
        (REQUEUE, {"squeue": ["echo RUNNING"], "scontrol": ["exit 1"]}, 5),  # it is refused
        (REQUEUE, {"squeue": [AWAY, "echo COMPLETING"], "scontrol": ["exit 0"]}, 0),
        (REQUEUE, {"squeue": [AWAY, NO_JOB], "scontrol": ["exit 0"]}, 0),
        (REQUEUE, {}, 0),  # SLURM's commands are not there
        (2, {"squeue": ["echo RUNNING"], "scontrol": ["exit 0"]}, 0),
        (140, {"squeue": ["echo RUNNING"], "scontrol": ["exit 0"]}, 1),
        (143, {"squeue": ["echo RUNNING"],
               "scontrol": [AWAY, "echo PreemptTime=2026-01-01", "exit 0"]}, 1),
        (143, {"squeue": ["echo RUNNING"], "scontrol": [AWAY, "echo PreemptTime=None"]}, 0),
    ],
)  # fmt: skip
def test_a_job_is_requeued_as_soon_as_slurm_answers(
    tmp_path: Path, code: int, answers: dict[str, list[str]], requeued: int
) -> None:
    left, calls = after_a_job(tmp_path, code, answers)
    assert left == code
    assert calls.count("scontrol requeue 17") == requeued, calls


def test_a_controller_that_stays_away_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "AWAY_SECONDS", 0)
    left, calls = after_a_job(tmp_path, REQUEUE, {"squeue": [AWAY], "scontrol": [AWAY]})
    assert left == REQUEUE and len(calls) == 1
