"""``g2rpo check cluster`` on what a real cluster of SLURM 22.05 answered (``slurm_recorded/``)."""

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
from slurm import states
from slurm.checks import cluster as checks
from slurm.checks import limits, site
from slurm.checks.cluster import check_cluster
from slurm.checks.finding import Case, Finding
from slurm.checks.limits import refuse_impossible
from slurm.checks.probe import QUESTION, Question, gpu_memory
from slurm.checks.site import Site
from slurm.cluster import Cluster
from slurm.graph import Needs

RECORDED = Path(__file__).parent / "slurm_recorded"
REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = {"train": Needs(4, 4), "sample": Needs(1, 1), "render": Needs()}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What SLURM answers, by the kind of question; tests change it. An ``error`` is raised."""
    kinds = ("config", "partitions", "sinfo", "qos", "associations")
    found = {kind: (RECORDED / f"{kind}.txt").read_text() for kind in kinds}
    names = {"partition": "partitions", "association": "associations"}
    names |= {name: name for name in ("config", "sinfo", "qos", "--test-only")}
    found["--test-only"] = "sbatch: Job 1 to start at 2026-11-29T11:26:00 using 2 processors\n"

    def ask(*command: str, **_: object) -> str:
        told = next((found[names[word]] for word in command if word in names), "")
        if told.startswith("error: "):
            raise UserError(told.removeprefix("error: "))
        return told

    for module in (site, checks, limits):
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


@pytest.mark.parametrize(
    ("state", "reserved", "usable"),
    [
        ("idle", False, True), ("mixed-", False, True), ("idle~", False, True),
        ("powered_down", False, True), ("down*", False, False), ("idle*", False, False),
        ("draining@", False, False), ("down", True, False), ("reserved", False, False),
        ("reserved", True, True), ("maint", False, False),
    ],
)  # fmt: skip
def test_states_of_a_node(state: str, reserved: bool, usable: bool) -> None:
    node = site.Node("n", state, "gpu:2", "4", "8000", "(null)", "none")
    assert node.usable(reserved=reserved) is usable


def test_a_fitting_profile_is_ok(answers: dict[str, str], tmp_path: Path) -> None:
    answers["sinfo"] = answers["sinfo"].replace("drained", "mixed")
    found = quick(tmp_path)
    assert words(found) == {"ok"}, found
    assert line(found, "SLURM").found == "cluster g2rpo answers, version 22.05.8"
    assert line(found, "nodes of main").found == "2 nodes, all usable"
    assert line(found, "sbatch takes train").found.startswith("would start at 2026-11-29")
    assert not list(tmp_path.iterdir())


def test_nodes_that_are_not_in_use(answers: dict[str, str], tmp_path: Path) -> None:
    found = line(quick(tmp_path), "nodes of main")
    assert found.word == "warning"
    assert found.found == "1 of 2 usable; not node2 (drained: fan is broken)"
    answers["sinfo"] = answers["sinfo"].replace("idle", "down*")
    assert line(quick(tmp_path), "nodes of main").word == "failed"


@pytest.mark.parametrize(
    ("told", "settings", "fix"),
    [
        ("invalid partition specified: mian allocation failure: Invalid partition name specified",
         {"partition": "mian"}, "set partition: did you mean 'main'?"),
        ("No partition specified or system default partition", {}, "one of high, main"),
        ("allocation failure: Invalid account or account/partition combination specified", {},
         "set account: to one of root"),
        ("allocation failure: Invalid qos specification", {}, "set qos: to one of day, normal"),
        ("allocation failure: Requested node configuration is not available", {},
         "usable are 1 node with gpu:2, 4 CPUs, 8 GB: set gpus_per_node"),
    ],
)  # fmt: skip
def test_what_sbatch_refuses_is_told_with_what_to_set(
    answers: dict[str, str], tmp_path: Path, told: str, settings: dict[str, Any], fix: str
) -> None:
    answers["--test-only"] = f"error: {told}"
    found = line(quick(tmp_path, **settings), "sbatch takes train")
    assert found.word == "failed" and told in found.found
    assert "--nodes=2" in found.found and "--gpus-per-node=2" in found.found
    assert fix in found.fix


def test_ranks_that_do_not_fill_nodes(answers: dict[str, str], tmp_path: Path) -> None:
    found = line(quick(tmp_path, {"train": Needs(3, 3)}), "sbatch takes train")
    assert found.word == "failed"
    assert "3 ranks do not fill nodes of 2" in found.found and "divisor of 3" in found.fix


def test_memory_by_default(answers: dict[str, str]) -> None:
    answers["config"] = answers["config"].replace("= 500", "= UNLIMITED")
    found = limits.memory(case(), Site.read())
    assert words(found) == {"warning"}
    assert words(limits.memory(case(memory_gb_per_task=2), Site.read())) == set()


def test_time_limits(answers: dict[str, str]) -> None:
    answers["partitions"] = answers["partitions"].replace(
        "MaxTime=UNLIMITED", "MaxTime=08:00:00", 1
    )
    found = line(limits.times(case(), Site.read()), "time of train")
    assert found.word == "failed"
    assert found.found == "asks for 1440 minutes, partition main allows 480"
    assert "minutes: {train: 480}" in found.fix
    assert words(limits.times(case(partition="main,high"), Site.read())) == {"ok"}
    tight = case({"render": Needs()}, minutes={"render": 3}, signal_lead_seconds=120)
    assert line(limits.times(tight, Site.read()), "time of render").word == "warning"
    with pytest.raises(UserError, match=r"time of train: asks for 1440 .*; set minutes"):
        refuse_impossible(case().cluster, TRAIN, 1)


def test_limits_of_accounts(answers: dict[str, str]) -> None:
    old = "AccountingStorageEnforce = none"
    assert old in answers["config"]
    day = case(qos="day", minutes={"train": 2880})
    assert words(limits.times(day, Site.read())) == {"ok"}  # nothing is enforced in the record
    answers["config"] = answers["config"].replace(old, old.replace("none", "limits,qos"))
    told = "asks for 2880 minutes, qos day allows 1440"
    assert line(limits.times(day, Site.read()), "time of train").found == told
    whole = answers.copy()
    limited = case(minutes={"train": 2880})
    # The account's own qos, the partition's, and one that stands above the partition's limit.
    answers["associations"] = answers["associations"].replace("normal||", "normal|day|")
    assert line(limits.times(limited, Site.read()), "time of train").found == told
    answers |= whole | {"partitions": whole["partitions"].replace("QoS=N/A", "QoS=day", 1)}
    assert line(limits.times(limited, Site.read()), "time of train").found == told
    assert words(limits.times(case(partition="high"), Site.read())) == {"ok"}
    answers |= whole | {
        "partitions": whole["partitions"].replace("MaxTime=UNLIMITED", "MaxTime=60:00"),
        "qos": whole["qos"].replace("|10||", "|10||PartitionTimeLimit"),
    }
    assert words(limits.times(case(), Site.read())) == {"failed"}
    assert words(limits.times(case(qos="day"), Site.read())) == {"ok"}
    answers |= whole
    shared = limits.jobs(case(shares=16, qos="day"), Site.read())
    assert "takes 10 of your jobs" in line(shared, "jobs").found
    many = case({"train": Needs(16, 16)}, qos="day", cpus_per_task=2)
    assert "allows 16 of cpu" in line(limits.jobs(many, Site.read()), "MaxTRESPU").found


def test_no_accounting_and_large_arrays(answers: dict[str, str]) -> None:
    kind = "accounting_storage/slurmdbd"
    answers["config"] = answers["config"].replace(kind, "accounting_storage/none")
    found = Site.read()
    assert line(limits.accounting(case(), found), "accounting").word == "warning"
    broken = replace(found, accounts_problem="sacct was not found")
    assert "sacct was not found; " in line(limits.accounting(case(), broken), "accounting").found
    array = line(limits.jobs(case(shares=1001), found), "arrays")
    assert array.found == "MaxArraySize allows 1000 jobs, a cell is shared by 1001"


def test_preemption(answers: dict[str, str]) -> None:
    def preemption(**settings: Any) -> Finding:
        return line(limits.stopping(case(**settings), Site.read()), "preemption")

    found = preemption(signal_lead_seconds=300)
    assert found.word == "warning" and "10 s (GraceTime)" in found.found
    assert preemption(partition="high").found == "off"
    answers["config"] = answers["config"].replace("preempt_send_user_signal", "(null)")
    found = preemption()
    assert found.word == "warning" and "checkpoints.every_minutes are lost" in found.found
    answers["config"] = answers["config"].replace("preempt/partition_prio", "preempt/none")
    assert preemption().found == "off"
    answers["config"] = answers["config"].replace("preempt/none", "preempt/qos")
    answers["qos"] = answers["qos"].replace("cluster", "cancel")
    found = preemption(qos="day")
    assert found.word == "warning" and "cancelled and not started again" in found.found


def test_without_slurm_nothing_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = Case(Cluster(extra={"reservatoin": "x"}), TRAIN, tmp_path / "a" / "b")
    found = check_cluster(missing)
    assert line(found, "SLURM").found.startswith("scontrol was not found")
    assert line(found, "SLURM").word == "failed"
    assert line(found, "extra: reservatoin").fix == "did you mean 'reservation'?"
    assert not list(tmp_path.iterdir())


def test_a_command_that_hangs_or_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, text in (
        ("squeue", "sleep 30"),
        ("scontrol", "echo a notice >&2; echo 'scontrol: error: no contact' >&2; exit 1"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(UserError, match="squeue did not answer within"):
        states.ask("squeue", seconds=0.6)
    found = line(check_cluster(Case(Cluster(), TRAIN, tmp_path / "results")), "SLURM")
    assert (found.word, found.found) == ("failed", "scontrol failed: scontrol: error: no contact")


def test_image_files(answers: dict[str, str], tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    inside = {"kind": "apptainer", "image": str(image)}
    assert line(quick(tmp_path, container=inside), "image").word == "failed"
    image.write_bytes(b"x")
    assert line(quick(tmp_path, container=inside), "image").word == "ok"


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    file = tmp_path / "prompts.txt"
    here = Case(Cluster(kind="local"), TRAIN, tmp_path / "results", files=(file,), disk_gb=1e9)
    found = check_cluster(here)
    assert line(found, "devices of train").found == "needs 4 GPUs, torch sees 0"
    assert line(found, "files here").word == "failed"
    assert line(found, "disk here").word == "warning"
    file.write_text("a cat\n")
    small = {"train": Needs(memory_gb=1)}
    assert words(check_cluster(replace(here, wanted=small, disk_gb=1.0))) == {"ok"}
    blocked = check_cluster(replace(here, wanted={}, results=file / "results"))
    assert line(blocked, f"the folder {file}").word == "failed"


def test_what_a_job_sees_where_names_weights_and_files_are_missing(tmp_path: Path) -> None:
    question = Question(
        files=(str(tmp_path / "gone.txt"),), modules=("json", "no_such_module"),
        artifacts=("flux-dev",), several=True, gpus=True,
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
    assert "no_such_module cannot be imported" in found["Python on no-such-node1"].found
    assert "no-such-node1" in found["names on no-such-node1"].found
    weights = found["weights on no-such-node1"].found
    assert "flux-dev" in weights and "huggingface" in weights


def test_gpus_that_are_too_small() -> None:
    found = gpu_memory([("A100", 39.6)], 80, "GPUs")
    assert (found.word, found.found) == ("failed", "A100, 40 GiB; needs 80 GB")
    assert gpu_memory([("A100", 79.3)], 80, "GPUs").word == "ok"


def test_what_the_paper_s_scale_asks_for() -> None:
    flux = load_profile("flux")
    assert needs_by_kind(flux)["train"] == Needs(16, 16)
    assert needs_by_kind(flux)["score"] == Needs(1, 1)
    found = case_of(flux, Cluster(), Path("results"), ["flux-dev"])
    assert (found.shares, found.gpu_memory_gb, found.artifacts) == (8, 80, ("flux-dev",))
    assert [path.name for path in found.files] == ["train.txt", "validation.txt", "test.txt"]
    assert len(case_of(load_profile("mini"), Cluster(), Path("results"), []).files) == 9
