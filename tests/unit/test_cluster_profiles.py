"""The bundled cluster profiles: each is valid, and together they show every setting."""

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from g2rpo.config import StrictModel, load_yaml, validate
from g2rpo.errors import UserError
from reproduce.cli import app
from slurm.cluster import Cluster, Container, Mail, Minutes, load_cluster
from slurm.graph import Needs

FOLDER = Path(__file__).resolve().parents[2] / "slurm" / "clusters"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_takes_the_paper_s_sixteen_gpus_on_two_nodes(path: Path) -> None:
    cluster = load_cluster(path.stem)
    assert cluster.kind == "slurm"
    needs = Needs(16, 16)
    assert (cluster.nodes(needs), cluster.tasks(needs)) == (2, 8)
    assert cluster.nodes(Needs(1, 1)) == 1


def test_together_they_show_every_setting() -> None:
    parts: dict[type[StrictModel], set[str]] = {Cluster: set(), Mail: set(), Minutes: set()}
    parts[Container] = set()
    for path in FILES:
        data: dict[str, Any] = load_yaml(path)
        parts[Cluster] |= data.keys()
        for model, key in ((Mail, "mail"), (Minutes, "minutes"), (Container, "container")):
            parts[model] |= data.get(key, {}).keys()
    assert len(FILES) == 3
    for model, keys in parts.items():
        assert keys == set(model.model_fields), model.__name__


def test_an_absent_file_is_answered_with_the_examples() -> None:
    with pytest.raises(UserError, match=r"mine\.yaml: no such file; copy an example from slurm/cl"):
        load_cluster("mine.yaml")


MISTAKES: dict[str, tuple[str, str]] = {
    "unknown key": ("partitoin: gpu", "partition"),
    "unknown part": ("container: {kind: none, imgae: x}", "image"),
    "newline": ('partition: "gpu\\n#SBATCH --uid=0"', "partition"),
    "name of a variable": ('environment: {"HF HOME": /a}', "environment"),
    "name of a flag": ('extra: {"reservation\\n#SBATCH --uid": 0}', "extra"),
    "flag set by itself": ("extra: {dependency: 'afterok:1'}", "dependency"),
    "image without a kind": ("container: {image: x.sif}", "needs kind: apptainer"),
    "short flag": ("extra: {p: gpu}", "extra: 'p': use the flag's long name"),
    "flag without anything": ("extra: {reservation: }", "extra.reservation: input should be"),
    "no image": ("container: {kind: apptainer}", "image"),
    "no time to save": ("{minutes: {train: 5}, signal_lead_seconds: 300}", "signal_lead_seconds"),
    "no time of a default": ("signal_lead_seconds: 1800", "render (30)"),
    "lead that sbatch refuses": ("signal_lead_seconds: 70000", "signal_lead_seconds"),
    "negative time": ("minutes: {train: -1:00}", "minutes.train: expected minutes, or a time"),
    "no time at all": ("minutes: {train: 1 day}", "D-HH:MM:SS (found '1 day')"),
    "seconds over 59": ("minutes: {train: 10:75}", "minutes.train"),
    "memory in MB": ("memory_gb_per_task: 120000", "memory_gb_per_task"),
    "empty partition": ('partition: ""', "partition: must not be empty"),
    "number for an account": ("account: 0123", "put it in quotes"),
    "partitions with spaces": ("partition: gpu, gpu2", "partition: must not be empty or contain"),
    "count in a GPU type": ("gpu_type: a100:8", "gpu_type"),
    "dashes of a flag": ("extra: {--reservation: x}", "without leading dashes"),
    "flag twice": ("extra: {time-min: 60, time_min: 60}", "the same flag"),
    "GPUs as gres": ('extra: {gres: "tmp:1,gpu:a100:2"}', "gpus_per_node"),
    "gres beside gres": ('{gpu_flag: gres, extra: {gres: "tmp:1"}}', "gpu_flag"),
    "nodes for jobs of one": ('extra: {nodelist: "n[01-04]"}', "exclude, constraint or reserv"),
    "flag that is off": ("extra: {hold: false}", "hold"),
    "text for a list": ("setup: module load cuda", "write a list"),
    "number for a variable": ("environment: {OMP_NUM_THREADS: 8}", "put it in quotes"),
    "flag of no type": ("extra: {nice: 1.5}", "extra.nice: "),
    "debug": ("kind: debug", "local with --jobs 1"),
    "nothing": ("# partition: gpu", "kind: slurm"),
}


MISTAKES |= {
    f"extra: {flag}": (f"extra: {{{flag}: 1}}", f"{flag} is not allowed: {instead}")
    for flag, instead in {
        "time": "set minutes", "signal": "set signal_lead_seconds", "mem": "set memory_gb_per_task",
        "gpus_per_node": "set gpus_per_node",
        "requeue": "jobs are requeued", "open_mode": "the launcher",
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_profile_is_one_line(case: str, tmp_path: Path) -> None:
    text, named = MISTAKES[case]
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        load_cluster(str(path))
    message = str(told.value)
    assert named in message and "site.yaml" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90), ('"90"', 90), ("090", 90), ("30:00", 30), ('"30:01"', 31), ("90:30", 91),
        ("24:00:00", 1440), ("48:00:01", 2881),
        ("2-12", 3600), ("1-06:30", 1830), ("0-48:00", 2880), ("7-00:00:00", 10080),
        ("0-00:10:01", 11), ("'  1-0 '", 1440),
    ],
)  # fmt: skip
def test_a_time_limit_is_minutes_or_what_sbatch_takes(
    text: str, minutes: int, tmp_path: Path
) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f"signal_lead_seconds: 60\nminutes: {{score: {text}}}\n")
    cluster = load_cluster(str(path))
    assert cluster.time_limit("score") == minutes
    assert validate(Cluster, cluster.model_dump(mode="json"), "stored") == cluster


def test_flags_that_may_be_given(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "{partition: 'gpu,gpu2', extra: {nice: true, hold: true, nodelist: n1, mem-per-cpu: 8G, "
        "gres: 'tmp:1', begin: 16:00, time-min: 00:20:00, wckey: no, reservation: 2026-01}}"
    )
    extra = load_cluster(str(path)).extra
    # Times, dates and a site's words stay text.
    assert (extra["begin"], extra["time-min"]) == ("16:00", "00:20:00")
    assert (extra["wckey"], extra["reservation"]) == ("no", "2026-01")


def test_a_limit_above_the_partition_s_own_is_refused_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Path(__file__).parent / "slurm_recorded" / "partitions.txt"
    text = recorded.read_text().replace("MaxTime=UNLIMITED", "MaxTime=8:00:00", 1)
    (tmp_path / "partitions").write_text(text)
    scontrol, profile = tmp_path / "scontrol", tmp_path / "site.yaml"
    scontrol.write_text(
        f"#!/bin/sh\n[ \"$2\" = config ] && echo 'MaxArraySize = 8' || cat {tmp_path}/partitions\n"
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def planned(settings: str) -> str:
        profile.write_text(settings)
        words = ["plan", "table3", "--profile", "flux", "--cluster", str(profile)]
        return str(CliRunner().invoke(app, words).exception)

    assert "allows 480; set minutes: {train: 480}" in planned("partition: main\n")
    array = "MaxArraySize allows 7 jobs, a cell has 8 shares"
    for settings in ("partition: high\n", "partition: main\nminutes: {train: 08:00:00}\n"):
        assert array in planned(settings)
    assert "16 ranks do not fill nodes of 6" in planned("gpus_per_node: 6\n")
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    assert planned("partition: main\n") == "None"


def test_ranks_fill_nodes_or_are_refused() -> None:
    cluster = Cluster(gpus_per_node=4, tasks_per_node=2)
    assert (cluster.nodes(Needs(8, 8)), cluster.tasks(Needs(8, 8))) == (2, 4)
    assert (cluster.nodes(Needs(3, 3)), cluster.tasks(Needs(3, 3))) == (1, 3)
    assert (cluster.nodes(Needs(2)), cluster.tasks(Needs(2))) == (1, 2)
    with pytest.raises(UserError, match="6 ranks do not fill nodes of 4; set gpus_per_node"):
        cluster.tasks(Needs(6, 6))


@pytest.fixture
def path_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of the path; no cluster is configured."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("G2RPO_CLUSTER", raising=False)
    return tmp_path


def test_auto_is_slurm_where_it_is_and_gpus_are_needed(path_with: Path) -> None:
    assert load_cluster("auto", gpus=16).kind == "local"
    command = path_with / "sbatch"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    assert load_cluster("auto", gpus=16).kind == "slurm"
    assert load_cluster("auto", gpus=0).kind == "local"
    assert load_cluster("local", gpus=16).kind == "local"


def test_auto_is_the_configured_one(path_with: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = path_with / "site.yaml"
    site.write_text("partition: gpu")
    monkeypatch.setenv("G2RPO_CLUSTER", str(site))
    found = load_cluster("auto")
    assert (found.name, found.kind, found.partition) == ("site", "slurm", "gpu")
    monkeypatch.setenv("G2RPO_CLUSTER", "h100-pixis")
    with pytest.raises(UserError, match="h100-pyxis"):
        load_cluster("auto")
