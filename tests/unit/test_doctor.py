"""The doctor's checks, on what a real cluster of SLURM 22.05 answered (``slurm_recorded/``)."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from g2rpo.errors import UserError
from reproduce.commands.doctor import conclude, options_of, print_findings, wanted_by
from reproduce.experiment import load_profile
from slurm.cluster import Cluster
from slurm.doctor import limits, nodes, place, requeue
from slurm.doctor import site as sites
from slurm.doctor.answers import judged
from slurm.doctor.examine import examine
from slurm.doctor.finding import Case, Finding, Options
from slurm.doctor.site import Site
from slurm.graph import Needs
from slurm.times import seconds_of

RECORDED = Path(__file__).parent / "slurm_recorded"
REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = {"train": Needs(4, 4), "sample": Needs(1, 1), "render": Needs()}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What SLURM answers, by the kind of question; tests change it."""
    kinds = ("config", "partitions", "nodes", "qos", "associations")
    found = {kind: (RECORDED / f"{kind}.txt").read_text() for kind in kinds}
    # A node that is drained is in the record; most tests want it back.
    found["drained"] = found["nodes"]
    found["nodes"] = found["nodes"].replace("IDLE+DRAIN", "IDLE")
    names = {
        "config": "config", "partition": "partitions", "node": "nodes", "qos": "qos",
        "association": "associations",
    }  # fmt: skip

    def ask(*command: str, text: str = "", seconds: float = 0) -> str:
        kind = next((word for word in command if word in names), None)
        return "" if kind is None else found[names[kind]]

    monkeypatch.setattr(sites, "ask", ask)
    return found


def case(
    wanted: Mapping[str, Needs] = TRAIN, options: Options | None = None, **settings: Any
) -> Case:
    base: dict[str, Any] = {"gpus_per_node": 2, "cpus_per_task": 1, "signal_lead_seconds": 10}
    return Case(Cluster(**base | settings), wanted, Path("/results"), options or Options())


def line(findings: Iterable[Finding], what: str) -> Finding:
    listing = list(findings)
    found = [finding for finding in listing if finding.what.startswith(what)]
    assert len(found) == 1, listing
    return found[0]


def words(findings: Iterable[Finding]) -> set[str]:
    return {finding.word for finding in findings}


def test_a_cluster_as_it_was_recorded(answers: dict[str, str]) -> None:
    answers["nodes"] = answers["drained"]
    site = Site.read()
    assert site.config["SLURM_VERSION"] == "22.05.8"
    assert site.default == "main" and set(site.partitions) == {"main", "high"}
    first, second = site.nodes_of("main")
    assert (first.cpus, first.memory_mb, first.gpus, first.features) == (4, 8000, {"": 2}, set())
    assert first.usable(reserved=False) and not second.usable(reserved=True)
    assert second.reason == "fan is broken"
    assert site.accounts is not None and set(site.accounts.qos) == {"normal", "day"}
    assert site.accounts.qos["day"]["MaxWall"] == "1-00:00:00"
    assert [row["Account"] for row in site.accounts.associations] == ["root"]
    assert site.has_option("SlurmctldParameters", "preempt_send_user_signal")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("UNLIMITED", None), ("", None), ("NONE", None), ("1-00:00:00", 86400), ("2-12", 216000),
        ("02:30:00", 9000), ("30:00", 1800), ("30 sec", 30), ("5 min", 300), ("00:00:00", 0),
    ],
)  # fmt: skip
def test_times(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:2", {"": 2}), ("gpu", {"": 1}), ("gpu:a100:8(S:0-1)", {"a100": 8}), ("(null)", {}),
        ("gpu:a100:4(S:0,2),gpu:v100:2,shard:8", {"a100": 4, "v100": 2}), ("craynetwork:4", {}),
    ],
)  # fmt: skip
def test_gpus_of_a_node(gres: str, gpus: dict[str, int]) -> None:
    assert sites.gpus_of(gres) == gpus


@pytest.mark.parametrize(
    ("state", "reserved", "usable"),
    [
        ("IDLE", False, True), ("MIXED+PLANNED", False, True),
        ("IDLE+CLOUD+POWERED_DOWN", False, True),
        ("DOWN*", False, False), ("IDLE*", False, False), ("MIXED+DRAIN", False, False),
        ("DOWN+NOT_RESPONDING", True, False), ("IDLE+RESERVED", False, False),
        ("IDLE+RESERVED", True, True), ("ALLOCATED+MAINT", False, False),
    ],
)  # fmt: skip
def test_states_of_a_node(state: str, reserved: bool, usable: bool) -> None:
    assert sites.Node("n", {"State": state}).usable(reserved=reserved) is usable


def test_a_fitting_profile_is_ok(answers: dict[str, str]) -> None:
    site = Site.read()
    for check in (nodes.partitions, nodes.layout, nodes.constraint, limits.times):
        assert words(check(case(), site)) <= {"ok"}
    for check in (limits.accounting, limits.jobs, requeue.requeueing, requeue.preemption):
        assert words(check(case(), site)) == {"ok"}
    found = line(nodes.layout(case(), site), "devices of train")
    assert found.found == "2 nodes with 2 GPUs, 2 CPUs; 2 such nodes usable"


def test_partitions(answers: dict[str, str]) -> None:
    site = Site.read()
    found = line(nodes.partitions(case(partition="mian"), site), "partition mian")
    assert (found.word, found.mend) == ("failed", "set partition: did you mean 'main'?")
    found = line(nodes.partitions(case(cpu_partition="cpus"), site), "cpu_partition cpus")
    assert found.word == "failed"
    assert words(nodes.partitions(case(partition="main,high"), site)) == {"ok"}
    answers["partitions"] = answers["partitions"].replace("State=UP", "State=DRAIN")
    assert line(nodes.partitions(case(), Site.read()), "partition main").found == "it is drain"
    answers["partitions"] = answers["partitions"].replace("Default=YES", "Default=NO")
    assert "has no default" in line(nodes.partitions(case(), Site.read()), "partition").found


def test_nodes_that_are_not_in_use(answers: dict[str, str]) -> None:
    answers["nodes"] = answers["drained"]
    site = Site.read()
    found = line(nodes.partitions(case(), site), "nodes of main")
    assert found.word == "warning"
    assert found.found == "1 of 2 usable; not node2 (idle+drain: fan is broken)"
    assert line(nodes.layout(case(), site), "devices of train").word == "failed"
    assert line(nodes.layout(case(), site), "devices of sample").word == "ok"
    answers["nodes"] = answers["nodes"].replace("State=IDLE ", "State=DOWN* ")
    assert line(nodes.partitions(case(), Site.read()), "nodes of main").word == "failed"


@pytest.mark.parametrize(
    ("settings", "wanted", "found", "mend"),
    [
        ({"gpus_per_node": 4}, TRAIN, "have 2 GPUs, 4 CPUs, 8 GB", "gpus_per_node: 2 or less"),
        ({"cpus_per_task": 3}, TRAIN, "the nodes have 2 GPUs", "cpus_per_task: 2 or less"),
        ({"memory_gb_per_task": 8}, TRAIN, "16 GB; the nodes", "memory_gb_per_task: 3 or less"),
        ({"gpu_type": "a100"}, TRAIN, "2 a100 GPUs", "gpu_type: null"),
        ({}, {"train": Needs(8, 8)}, "2 such nodes in all", "fewer ranks"),
        ({}, {"train": Needs(3, 3)}, "3 ranks do not fill nodes of 2", "divisor of 3"),
        ({"tasks_per_node": 8}, {"train": Needs(8)}, "8 CPUs; the", "tasks_per_node: 4 or less"),
    ],
)  # fmt: skip
def test_devices_that_nodes_do_not_have(
    answers: dict[str, str],
    settings: dict[str, Any],
    wanted: dict[str, Needs],
    found: str,
    mend: str,
) -> None:
    told = line(nodes.layout(case(wanted, **settings), Site.read()), "devices of train")
    assert told.word == "failed"
    assert found in told.found and mend in told.mend


def test_typed_gpus_features_and_memory_by_default(answers: dict[str, str]) -> None:
    answers["nodes"] = (
        answers["nodes"].replace("Gres=gpu:2", "Gres=gpu:a100:2(S:0)")
        .replace("ActiveFeatures=(null)", "ActiveFeatures=ib")
        .replace("AvailableFeatures=(null)", "AvailableFeatures=ib,big", 1)
    )  # fmt: skip
    site = Site.read()
    assert line(nodes.layout(case(gpu_type="a100"), site), "devices of train").word == "ok"
    wrong = line(nodes.layout(case(gpu_type="h100"), site), "devices of train")
    assert wrong.mend == "set gpu_type: a100"
    assert line(nodes.constraint(case(constraint="ib&big"), site), "constraint").found.startswith(
        "1 "
    )
    assert line(nodes.layout(case(constraint="big"), site), "devices of train").word == "failed"
    unknown = line(nodes.constraint(case(constraint="[ib*2|fat]"), site), "constraint")
    assert unknown.word == "failed" and unknown.found.endswith("has fat")
    answers["config"] = answers["config"].replace("= 500", "= UNLIMITED")
    assert line(nodes.layout(case(), Site.read()), "memory of train").word == "warning"
    assert words(nodes.layout(case(memory_gb_per_task=2), Site.read())) == {"ok"}


def test_time_limits(answers: dict[str, str]) -> None:
    answers["partitions"] = answers["partitions"].replace(
        "MaxTime=UNLIMITED", "MaxTime=08:00:00", 1
    )
    site = Site.read()
    found = line(limits.times(case(), site), "time of train")
    assert found.word == "failed"
    assert found.found == "asks for 1440 minutes, partition main allows 480"
    assert "minutes: {train: 480}" in found.mend
    assert words(limits.times(case(partition="main,high"), site)) == {"ok"}
    tight = case({"render": Needs()}, minutes={"render": 3}, signal_lead_seconds=120)
    assert line(limits.times(tight, Site.read()), "time of render").word == "warning"


def test_accounts_and_their_limits(answers: dict[str, str]) -> None:
    found = line(limits.accounting(case(account="nobody"), Site.read()), "account nobody")
    assert found.word == "warning"  # nothing is enforced in the record
    old = "AccountingStorageEnforce = none"
    assert old in answers["config"]
    answers["config"] = answers["config"].replace(
        old, old.replace("none", "associations,limits,qos")
    )
    site = Site.read()
    found = line(limits.accounting(case(account="nobody"), site), "account nobody")
    assert found.word == "failed" and "root" in found.mend
    assert line(limits.accounting(case(qos="dya"), site), "qos dya").mend.endswith("'day'?")
    assert line(limits.accounting(case(qos="day"), site), "qos day").found == "not yours"
    assert words(limits.accounting(case(qos="normal", account="root"), site)) == {"ok"}
    found = line(limits.times(case(qos="day", minutes={"train": 2880}), site), "time of train")
    assert found.found == "asks for 2880 minutes, qos day allows 1440"
    whole = answers.copy()
    limited = case(minutes={"train": 2880})
    # The account's own qos, the partition's, and one that stands above the partition's limit.
    answers["associations"] = answers["associations"].replace("normal||", "normal|day|")
    found = line(limits.times(limited, Site.read()), "time of train")
    assert found.found == "asks for 2880 minutes, qos day allows 1440"
    answers |= whole | {"partitions": whole["partitions"].replace("QoS=N/A", "QoS=day", 1)}
    found = line(limits.times(limited, Site.read()), "time of train")
    assert found.found == "asks for 2880 minutes, qos day allows 1440"
    assert words(limits.times(case(partition="high"), Site.read())) == {"ok"}
    answers |= whole | {
        "partitions": whole["partitions"].replace("MaxTime=UNLIMITED", "MaxTime=60:00"),
        "qos": whole["qos"].replace("|10||", "|10||PartitionTimeLimit"),
    }
    assert words(limits.times(case(), Site.read())) == {"failed"}
    assert words(limits.times(case(qos="day"), Site.read())) == {"ok"}
    answers |= whole
    shared = case(options=Options(shares=16), qos="day")
    assert "takes 10 of your jobs" in line(limits.jobs(shared, site), "jobs").found
    many = case({"train": Needs(16, 16)}, qos="day", cpus_per_task=2)
    assert "allows 16 of cpu" in line(limits.jobs(many, site), "MaxTRESPU").found
    answers["partitions"] = answers["partitions"].replace("AllowQos=ALL", "AllowQos=day")
    found = [each for each in limits.accounting(case(qos="normal"), Site.read()) if each.mend]
    assert [each.mend for each in found] == ["set qos: to one of day"]


def test_no_accounting_and_large_arrays(answers: dict[str, str]) -> None:
    kind = "accounting_storage/slurmdbd"
    answers["config"] = answers["config"].replace(kind, "accounting_storage/none")
    site = Site.read()
    assert site.accounts is None
    assert line(limits.accounting(case(), site), "accounting").word == "warning"
    broken = Site(site.config, site.partitions, site.nodes, None, "sacct was not found")
    assert "sacct was not found; " in line(limits.accounting(case(), broken), "accounting").found
    array = limits.jobs(case(options=Options(shares=1001)), site)
    assert line(array, "arrays").found == "MaxArraySize allows 1000 jobs, a cell is shared by 1001"


def test_preemption(answers: dict[str, str]) -> None:
    long = case(signal_lead_seconds=300)
    found = line(requeue.preemption(long, Site.read()), "preemption in main")
    assert found.word == "warning" and "10 s (GraceTime)" in found.found
    assert (
        line(requeue.preemption(case(partition="high"), Site.read()), "preemption").found == "off"
    )
    answers["config"] = answers["config"].replace("preempt_send_user_signal", "(null)")
    found = line(requeue.preemption(case(), Site.read()), "preemption in main")
    assert found.word == "warning" and "checkpoints.every_minutes are lost" in found.found
    answers["config"] = answers["config"].replace("preempt/partition_prio", "preempt/none")
    assert line(requeue.preemption(case(), Site.read()), "preemption").found == "off"
    answers["config"] = answers["config"].replace("preempt/none", "preempt/qos")
    answers["qos"] = answers["qos"].replace("cluster", "cancel")
    found = line(requeue.preemption(case(qos="day"), Site.read()), "preemption")
    assert found.word == "warning" and "cancelled and not started again" in found.found


def test_requeueing_where_the_site_does_not(answers: dict[str, str]) -> None:
    answers["config"] = answers["config"].replace("JobRequeue              = 1", "JobRequeue = 0")
    assert line(requeue.requeueing(case(), Site.read()), "requeueing").found.startswith(
        "off unless"
    )


def test_without_slurm_nothing_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = examine(Cluster(), TRAIN, tmp_path / "a" / "b")
    assert line(found, "SLURM").found.startswith("sbatch, squeue, ")
    assert line(found, "SLURM").word == "failed"
    assert not list(tmp_path.iterdir())
    found = examine(Cluster(extra={"reservatoin": "x"}), TRAIN, tmp_path / "a" / "b")
    assert line(found, "extra: reservatoin").mend == "did you mean 'reservation'?"


def test_a_command_that_hangs_or_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("sbatch", "squeue", "scancel", "srun", "scontrol"):
        script = tmp_path / name
        script.write_text("#!/bin/sh\nsleep 30\n")
        script.chmod(0o755)
    with pytest.raises(UserError, match="squeue did not answer within 1 s"):
        sites.ask("squeue", seconds=0.6)
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\n"
        "echo 'scontrol: error: one' >&2; echo 'scontrol: fatal: no contact' >&2; exit 1\n"
    )
    found = line(examine(Cluster(), TRAIN, tmp_path / "results"), "SLURM")
    assert (found.word, found.found) == ("failed", "scontrol: no contact")


def test_images_and_runtimes(tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    inside = {"kind": "apptainer", "image": str(image)}
    assert line(place.container(case(container=inside)), "image").word == "failed"
    image.write_bytes(b"x")
    assert line(place.container(case(container=inside)), "image").word == "ok"
    pyxis = case(container={"kind": "pyxis", "image": "nvcr.io#a/b:1"})
    assert "pyxis is not installed" in line(place.container(pyxis), "container").found


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file = tmp_path / "prompts.txt"
    options = Options(files=(file,), disk_gb=1e9)
    local = Cluster(kind="local")
    found = examine(local, TRAIN, tmp_path / "results", options)
    assert line(found, "devices of train").found == "needs 4 GPUs, torch sees 0"
    assert line(found, "files").word == "failed"
    assert line(found, "disk").word == "warning"
    file.write_text("a cat\n")
    found = examine(
        local, {"train": Needs(memory_gb=1)}, tmp_path / "results", Options(files=(file,))
    )
    assert words(found) == {"ok"}
    blocked = examine(local, {}, file / "results")
    assert line(blocked, f"the folder {file}").word == "failed"


def probe(folder: Path, question: dict[str, Any], **environment: str) -> dict[str, Any]:
    (folder / "question.json").write_text(json.dumps(question))
    subprocess.run(
        [sys.executable, "-m", "slurm.doctor.probe", str(folder)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), **environment},
        check=True,
        timeout=600,
    )
    answer: dict[str, Any] = json.loads((folder / "answer-0.json").read_text())
    return answer


def test_what_a_job_sees_where_names_weights_and_files_are_missing(tmp_path: Path) -> None:
    question = {
        "files": [str(tmp_path / "gone.txt")], "modules": ["json", "no_such_module"],
        "artifacts": ["flux-dev"], "gpus": 0,
    }  # fmt: skip
    answer = probe(
        tmp_path,
        question,
        SLURM_JOB_ID="1",
        SLURM_JOB_NODELIST="no-such-node[1-2]",
        SLURMD_NODENAME="no-such-node1",
        HF_HOME=str(tmp_path / "huggingface"),
    )
    assert "no-such-node1" in answer["meeting"]
    options = Options(files=(tmp_path / "gone.txt",), artifacts=("flux-dev",))
    found = list(judged(case(options=options), Needs(1), answer))
    lines = {each.what.split()[0]: each for each in found}
    assert {name for name, each in lines.items() if each.word == "failed"} == {
        "Python", "names", "files", "weights",
    }  # fmt: skip
    assert "no_such_module cannot be imported" in lines["Python"].found
    assert "flux-dev" in lines["weights"].found and "huggingface" in lines["weights"].found


def test_gpus_too_small_or_not_seen() -> None:
    answer: dict[str, Any] = {
        "node": "n", "python": "3", "free_gb": 9, "absent": [], "modules": {}, "meeting": "",
        "artifacts": {}, "gpus": [],
    }  # fmt: skip
    assert line(judged(case(), Needs(1, 1), answer), "GPUs").word == "failed"
    answer["gpus"] = [{"name": "A100", "memory_gb": 39.6}]
    needed = case(options=Options(gpu_memory_gb=80))
    assert line(judged(needed, Needs(1, 1), answer), "GPUs").found == "A100, 40 GiB; needs 80 GB"
    answer["gpus"] = [{"name": "A100", "memory_gb": 79.3}]
    assert line(judged(needed, Needs(1, 1), answer), "GPUs").word == "ok"


def test_what_the_paper_s_scale_asks_for() -> None:
    flux = load_profile("flux")
    assert wanted_by(flux)["train"] == Needs(16, 16)
    assert wanted_by(flux)["score"] == Needs(1, 1)
    options = options_of(flux, ["flux-dev"], quick=True)
    assert (options.shares, options.gpu_memory_gb, options.quick) == (8, 80, True)
    assert [path.name for path in options.files] == ["train.txt", "validation.txt", "test.txt"]
    assert len(options_of(load_profile("mini"), [], quick=True).files) == 9


def test_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    findings = [Finding("ok", "a", "b"), Finding("warning", "[c]", long)]
    print_findings(findings)
    conclude(findings, "cluster here")
    out = capsys.readouterr().out
    assert long in out and "[c]" in out
    assert out.endswith("cluster here: ready, 1 warning\n")
    with pytest.raises(UserError) as caught:
        conclude([*findings, Finding("failed", "d", "e", "f")], "cluster here")
    assert str(caught.value) == "cluster here: 1 of 3 checks failed; the first: d: e; f"
