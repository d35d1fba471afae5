"""``g2rpo check cluster`` on answers of a real SLURM 22.05, shortened (``slurm_recorded/``)."""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from g2rpo.errors import UserError
from reproduce.checks.scale import case_of, needs_by_kind
from reproduce.experiment import load_profile
from slurm.checks import cluster as checks
from slurm.checks import limits
from slurm.checks.cluster import check_cluster
from slurm.checks.finding import Case, Finding, Question
from slurm.checks.limits import Site
from slurm.checks.probe import QUESTION, gpu_memory
from slurm.cluster import Cluster
from slurm.graph import Needs

RECORDED = Path(__file__).parent / "slurm_recorded"
REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = {"train": Needs(4, 4), "sample": Needs(1, 1), "render": Needs()}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """SLURM's answer to each kind of question; tests change it. An ``error`` is raised."""
    found = {kind: (RECORDED / f"{kind}.txt").read_text() for kind in ("config", "sinfo", "qos")}
    found["partition"] = (RECORDED / "partitions.txt").read_text()
    found["--test-only"] = "sbatch: Job 1 to start at 2026-11-29T11:26:00 using 2 processors\n"

    def ask(*command: str, **_: object) -> str:
        answer = next((found[word] for word in command if word in found), "")
        if answer.startswith("error: "):
            raise UserError(answer.removeprefix("error: "))
        return answer

    for module in (checks, limits):
        monkeypatch.setattr(module, "ask", ask)
    return found


def case(wanted: Mapping[str, Needs] = TRAIN, shares: int = 1, **settings: Any) -> Case:
    base: dict[str, Any] = {"gpus_per_node": 2, "cpus_per_task": 1, "signal_lead_seconds": 10}
    return Case(Cluster(**base | settings), wanted, Path("/results"), shares=shares)


def line(findings: Iterable[Finding], what: str) -> Finding:
    listing = list(findings)
    found = [finding for finding in listing if finding.what.startswith(what)]
    assert len(found) == 1, listing
    return found[0]


def words(findings: Iterable[Finding]) -> set[str]:
    return {finding.word for finding in findings}


def quick(tmp_path: Path, wanted: Mapping[str, Needs] = TRAIN, **settings: Any) -> list[Finding]:
    return check_cluster(
        replace(case(wanted, **settings), results=tmp_path / "results", quick=True)
    )


def test_a_profile_that_fits_and_nodes_that_do_not_work(
    answers: dict[str, str], tmp_path: Path
) -> None:
    recorded = answers["sinfo"]
    answers["sinfo"] = recorded.replace("drained", "mixed")
    found = quick(tmp_path)
    assert words(found) == {"ok"}, found
    assert line(found, "SLURM").found == "cluster g2rpo answers, version 22.05.8"
    assert line(found, "nodes of main").found.startswith("node1 idle (gpu:2, 4 CPUs, 8000 MB); ")
    assert line(found, "sbatch accepts train").found.startswith("would start at 2026-11-29")
    assert not list((tmp_path / "results").iterdir())
    answers["sinfo"] = recorded
    nodes = line(quick(tmp_path), "nodes of main")
    assert nodes.word == "warning"
    assert nodes.found.endswith("node2 drained (fan is broken)")
    answers["sinfo"] = recorded.replace("idle", "idle*")  # it does not respond
    assert line(quick(tmp_path), "nodes of main").word == "failed"
    found = check_cluster(replace(case(), results=tmp_path / "results"))
    assert line(found, "trial job").found == "not submitted: the partition has no usable node"


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        ("allocation failure: Invalid partition name specified",
         "set partition: did you mean 'main'?"),
        ("allocation failure: Invalid account or account/partition combination specified",
         "set account:"),
        ("allocation failure: Invalid qos specification", "set qos: to one of day, normal"),
        ("allocation failure: Requested node configuration is not available",
         "change gpus_per_node"),
    ],
)  # fmt: skip
def test_a_rejection_by_sbatch_names_what_to_change(
    answers: dict[str, str], tmp_path: Path, error: str, fix: str
) -> None:
    answers["--test-only"] = f"error: {error}"
    found = line(quick(tmp_path, partition="mian"), "sbatch accepts train")
    assert found.word == "failed" and error in found.found
    assert "--nodes=2" in found.found and "--gpus-per-node=2" in found.found
    assert fix in found.fix


def test_the_partition_of_stages_without_gpus_is_named(
    answers: dict[str, str], tmp_path: Path
) -> None:
    answers["--test-only"] = "error: allocation failure: Invalid partition name specified"
    stages = {"render": Needs()}
    found = line(quick(tmp_path, stages, cpu_partition="mian"), "sbatch accepts render")
    assert found.fix == "set cpu_partition: did you mean 'main'?"
    answers["--test-only"] = "error: Requested partition configuration not available now"
    assert line(quick(tmp_path, stages), "sbatch accepts render").fix.startswith("change gpus")


def test_resources_that_do_not_fit(answers: dict[str, str], tmp_path: Path) -> None:
    found = line(quick(tmp_path, {"train": Needs(3, 3)}), "sbatch accepts train")
    assert found.word == "failed"
    assert "3 ranks do not fill nodes of 2" in found.found and "divisor of 3" in found.fix
    answers["config"] = answers["config"].replace("= 500", "= UNLIMITED")
    assert words(limits.memory(case(), Site.read())) == {"warning"}
    assert words(limits.memory(case(memory_gb_per_task=2), Site.read())) == set()
    array = line(limits.arrays(case(shares=1001), Site.read()), "arrays")
    assert array.found == "MaxArraySize allows 1000 jobs, a cell has 1001 shares"


def test_time_limits(answers: dict[str, str]) -> None:
    def longest(**settings: Any) -> Finding:
        return line(limits.times(case(**settings), Site.read()), "time")

    whole, limited = answers["partition"], "MaxTime=08:00:00"
    answers["partition"] = whole.replace("MaxTime=UNLIMITED", limited, 1)
    found = longest()
    assert found.word == "failed"
    assert found.found == "asks for 1440 minutes, partition main allows 480"
    assert "minutes: {train: 480}" in found.fix
    assert longest(partition="main,high").word == "ok"
    tight = longest(wanted={"render": Needs()}, minutes={"render": 3}, signal_lead_seconds=120)
    assert tight.word == "warning"
    # A qos limits jobs if the site enforces it: the profile's, or the partition's.
    long = {"minutes": {"train": 2880}}
    answers["partition"] = whole
    assert longest(qos="day", **long).word == "ok"
    answers["config"] = answers["config"].replace("Enforce = none", "Enforce = limits,qos")
    message = "asks for 2880 minutes, qos day allows 1440"
    assert longest(qos="day", **long).found == message
    answers["partition"] = whole.replace("QoS=N/A", "QoS=day", 1)
    assert longest(**long).found == message
    assert longest(partition="high", **long).word == "ok"
    # One with this flag overrides the partition.
    answers["partition"] = whole.replace("MaxTime=UNLIMITED", "MaxTime=60:00")
    answers["qos"] = answers["qos"].replace("1-00:00:00|", "1-00:00:00|PartitionTimeLimit")
    assert longest().word == "failed" and longest(qos="day").word == "ok"


def test_preemption(answers: dict[str, str]) -> None:
    def preemption(**settings: Any) -> Finding:
        return line(limits.preemption(case(**settings), Site.read()), "preemption")

    found = preemption(signal_lead_seconds=300)
    assert found.word == "warning" and "10 s (GraceTime)" in found.found
    assert preemption().word == "ok"
    assert preemption(partition="high").found == "off"
    answers["config"] = answers["config"].replace("preempt_send_user_signal", "(null)")
    found = preemption()
    assert found.word == "warning" and "checkpoints.every_minutes" in found.fix
    answers["config"] = answers["config"].replace("preempt/partition_prio", "preempt/none")
    assert preemption().found == "off"
    answers["config"] = answers["config"].replace("preempt/none", "preempt/qos")
    answers["qos"] = answers["qos"].replace("cluster", "cancel")
    found = preemption(qos="day")
    assert found.word == "warning" and "cancelled and not restarted" in found.found


def test_a_slurm_that_is_missing_or_does_not_answer_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    case = Case(Cluster(), TRAIN, tmp_path / "results")
    found = line(check_cluster(case), "SLURM")
    assert found.word == "failed" and found.found.startswith("scontrol not found")
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\necho a notice\necho error: no contact >&2\nexit 1\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    found = line(check_cluster(case), "SLURM")
    assert (found.word, found.found) == ("failed", "scontrol failed: error: no contact")


def test_image_files(answers: dict[str, str], tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    inside = {"kind": "apptainer", "image": str(image)}
    assert line(quick(tmp_path, container=inside), "image").word == "failed"
    image.write_bytes(b"x")
    assert line(quick(tmp_path, container=inside), "image").word == "ok"


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    file = tmp_path / "prompts.txt"
    question = Question(files=(str(file),), disk_gb=1e9)
    here = Case(Cluster(kind="local"), TRAIN, tmp_path / "results", question=question)
    found = check_cluster(here)
    assert line(found, "GPUs here").found == "needs 4, torch sees none"
    assert line(found, "files here").word == "failed"
    assert line(found, "disk here").word == "warning"
    file.write_text("a cat\n")
    fitting = replace(here, wanted={"train": Needs(memory_gb=1)}, question=Question())
    assert words(check_cluster(fitting)) == {"ok"}
    large = replace(fitting, wanted={"train": Needs(memory_gb=10**6)})
    assert line(check_cluster(large), "memory here").word == "failed"
    blocked = check_cluster(replace(here, wanted={}, results=file / "results"))
    assert line(blocked, f"the folder {file}").word == "failed"


def test_a_job_reports_missing_names_weights_and_files(tmp_path: Path) -> None:
    question = Question(
        files=(str(tmp_path / "gone.txt"),), modules=("json", "no_such_module"),
        artifacts=("flux-dev",), several=True, gpus=1,
    )  # fmt: skip
    (tmp_path / QUESTION).write_text(question.model_dump_json())
    job = {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "no-such-node[1-2]",
        "SLURMD_NODENAME": "no-such-node1", "HF_HOME": str(tmp_path / "huggingface"),
        "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "slurm.checks.probe", str(tmp_path)],
        env=os.environ | job,
        check=True,
        timeout=600,
    )
    answer = (tmp_path / "answer-0.json").read_text()
    found = {each.what: each for each in TypeAdapter(list[Finding]).validate_json(answer)}
    assert {what for what, each in found.items() if each.word == "failed"} == {
        f"{what} on no-such-node1" for what in ("Python", "names", "GPUs", "files", "weights")
    }
    assert "cannot import no_such_module" in found["Python on no-such-node1"].found
    weights = found["weights on no-such-node1"].found
    assert "flux-dev" in weights and "huggingface" in weights


def test_gpus_that_are_too_small() -> None:
    found = gpu_memory([("A100", 39.6)], 80, "GPUs")
    assert (found.word, found.found) == ("failed", "A100, 40 GiB; needs 80 GB")
    assert gpu_memory([("A100", 79.3)], 80, "GPUs").word == "ok"


def test_the_case_of_the_paper_s_profile() -> None:
    flux = load_profile("flux")
    assert needs_by_kind(flux)["train"] == Needs(16, 16)
    assert needs_by_kind(flux)["score"] == Needs(1, 1)
    found = case_of(flux, Cluster(), Path("results"), ["flux-dev"])
    asked = found.question
    assert (found.shares, asked.gpu_memory_gb, asked.artifacts) == (8, 80, ("flux-dev",))
    names = [Path(path).name for path in asked.files]
    assert names == ["train.txt", "validation.txt", "test.txt"]
    mini = case_of(load_profile("mini"), Cluster(), Path("results"), [])
    assert len(mini.question.files) == 9
