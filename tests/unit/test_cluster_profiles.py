"""The bundled cluster profiles: each is valid, and together they show every setting."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
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


MISTAKES: dict[str, tuple[str, str]] = {
    "unknown key": ("partitoin: gpu", "partition"),
    "unknown part": ("container: {kind: none, imgae: x}", "image"),
    "unknown limit": ("minutes: {trian: 60}", "train"),
    "newline": ('partition: "gpu\\n#SBATCH --uid=0"', "partition"),
    "newline in a shell line": ('setup: ["module load cuda\\nrm x"]', "setup"),
    "name of a variable": ('environment: {"HF HOME": /a}', "environment"),
    "name of a flag": ('extra: {"reservation\\n#SBATCH --uid": 0}', "extra"),
    "flag set by itself": ("extra: {dependency: 'afterok:1'}", "dependency"),
    "image without a kind": ("container: {image: x.sif}", "needs a kind: apptainer"),
    "short flag": ("extra: {p: gpu}", "extra: 'p': write a flag's long name"),
    "flag without anything": ("extra: {reservation: }", "extra.reservation: input should be"),
    "no image": ("container: {kind: apptainer}", "image"),
    "no such container": ("container: {kind: docker, image: x}", "container"),
    "no time": ("minutes: {train: 0}", "minutes.train"),
    "no time to save": ("{minutes: {train: 5}, signal_lead_seconds: 300}", "signal_lead_seconds"),
    "no time of a default": ("signal_lead_seconds: 1800", "render (30)"),
    "lead that sbatch refuses": ("signal_lead_seconds: 70000", "signal_lead_seconds"),
    "negative time": ("minutes: {train: -1:00}", "minutes.train: expected minutes, or a time"),
    "no time at all": ("minutes: {train: 1 day}", "D-HH:MM:SS (found '1 day')"),
    "unlimited time": ("minutes: {train: UNLIMITED}", "D-HH:MM:SS"),
    "seconds over 59": ("minutes: {train: 10:75}", "minutes.train"),
    "yes for a time": ("minutes: {train: true}", "minutes.train"),
    "no memory": ("memory_gb_per_task: 0", "memory_gb_per_task"),
    "memory in MB": ("memory_gb_per_task: 120000", "memory_gb_per_task"),
    "empty partition": ('partition: ""', "partition: must not be empty"),
    "number for an account": ("account: 0123", "put it in quotes"),
    "partitions with spaces": ("partition: gpu, gpu2", "partition: must not be empty or hold sp"),
    "count in a GPU type": ("gpu_type: a100:8", "gpu_type"),
    "dashes of a flag": ("extra: {--reservation: x}", "without the dashes"),
    "flag twice": ("extra: {time-min: 60, time_min: 60}", "twice"),
    "memory twice": ("{memory_gb_per_task: 1, extra: {mem_per_cpu: 8G}}", "memory_gb_per_task"),
    "GPUs as gres": ('extra: {gres: "tmp:1,gpu:a100:2"}', "gpus_per_node"),
    "gres beside gres": ('{gpu_flag: gres, extra: {gres: "tmp:1"}}', "gpu_flag"),
    "shared and exclusive": ("{exclusive: true, extra: {oversubscribe: true}}", "exclusive"),
    "nodes for jobs of one": ('extra: {nodelist: "n[01-04]"}', "exclude, constraint or reserv"),
    "least time above a limit": ("extra: {time-min: 01:00:00}", "time-min"),
    "least time below the lead": ("extra: {time-min: 5}", "time-min"),
    "value of a plain flag": ('extra: {hold: "yes"}', "hold cannot be set here: it takes no value"),
    "flag without its value": (
        "extra: {reservation: true}",
        "reservation cannot be set here: it n",
    ),
    "flag that is off": ("extra: {hold: false}", "hold"),
    "text for a list": ("setup: module load cuda", "write a list"),
    "number for a variable": ("environment: {OMP_NUM_THREADS: 8}", "put it in quotes"),
    "flag of no type": ("extra: {nice: 1.5}", "extra.nice: "),
    "debug": ("kind: debug", "local with --jobs 1"),
    "nothing": ("# partition: gpu", "kind: slurm"),
    "no mapping": ("- partition", "expected a mapping"),
}


MISTAKES |= {
    f"extra: {flag}": (f"extra: {{{flag}: 1}}", f"{flag} cannot be set here: {instead}")
    for flag, instead in {
        "time": "set minutes", "signal": "set signal_lead_seconds", "mem": "set memory_gb_per_task",
        "cpus-per-task": "set cpus_per_task", "gpus_per_node": "set gpus_per_node",
        "nodes": "set gpus_per_node and tasks_per_node", "partition": "set partition",
        "account": "set account", "qos": "set qos", "constraint": "set constraint",
        "exclusive": "set exclusive", "mail-user": "set mail", "export": "set environment",
        "requeue": "jobs are requeued", "output": "the launcher", "open_mode": "the launcher",
        "wrap": "jobs run", "wait": "sbatch would not",
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_profile_is_told_in_one_line(case: str, tmp_path: Path) -> None:
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
        "gres: 'tmp:1', begin: 16:00, time-min: 00:20:00, wckey: no, licenses: 'a:1', "
        "reservation: 2026-01, oversubscribe: true}}"
    )
    extra = load_cluster(str(path)).extra
    # Times, dates and words of a site are text, as sbatch takes them.
    assert (extra["begin"], extra["time-min"]) == ("16:00", "00:20:00")
    assert (extra["wckey"], extra["reservation"]) == ("no", "2026-01")


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Gives a command of SLURM that answers with a text, whatever it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def give(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return give


def planned(profile: Path, *words: str) -> Result:
    return CliRunner().invoke(
        app, ["plan", "table3", "--profile", "flux", "--cluster", str(profile), *words]
    )


@pytest.mark.parametrize(
    ("partition", "found"),
    [
        ("main", "asks for 1440 minutes, partition main allows 480; set minutes: {train: 480}"),
        ("high", None),
        ("main,high", None),
        ("nowhere", None),
    ],
)
def test_a_limit_above_the_partition_s_own_is_refused_by_the_plan(
    answering: Callable[[str, str], None], tmp_path: Path, partition: str, found: str | None
) -> None:
    recorded = Path(__file__).parent / "slurm_recorded"
    text = (recorded / "partitions.txt").read_text()
    (tmp_path / "partitions").write_text(text.replace("MaxTime=UNLIMITED", "MaxTime=8:00:00", 1))
    answering(
        "scontrol",
        f'[ "$2" = config ] && echo "AccountingStorageType = accounting_storage/none" || '
        f'cat "{tmp_path / "partitions"}"',
    )
    profile = tmp_path / "site.yaml"
    profile.write_text(f"partition: {partition}\n")
    done = planned(profile)
    if found is None:
        assert done.exit_code == 0, done.exception
        return
    assert isinstance(done.exception, UserError)
    assert found in str(done.exception)
    profile.write_text("partition: main\nminutes: {train: 08:00:00}\n")
    assert planned(profile).exit_code == 0
    answering("scontrol", '[ "$2" = config ] && echo "MaxArraySize = 8"; exit 0')
    done = planned(profile)
    assert "MaxArraySize allows 7 jobs, a cell is shared by 8" in str(done.exception)


def test_a_flag_that_sbatch_does_not_know_is_refused_by_the_plan(
    answering: Callable[[str, str], None], tmp_path: Path
) -> None:
    profile = tmp_path / "site.yaml"
    for command in ("scontrol", "sbatch"):
        answering(command, "exit 1")
    for extra, hint in (("reservatoin: x", "'reservation'"), ("lustre: true", "plug-ins")):
        profile.write_text(f"extra: {{{extra}}}\n")
        for words in ((), ("--dry-run",)):
            done = planned(profile, *words)
            assert isinstance(done.exception, UserError)
            assert "sbatch has no such flag" in str(done.exception)
            assert hint in str(done.exception)
    answering("sbatch", "echo '      --lustre   Give each job its folder.'")
    assert planned(profile).exit_code == 0


def test_ranks_that_do_not_fill_nodes_are_refused_by_the_plan(tmp_path: Path) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text("gpus_per_node: 6\n")
    done = planned(profile, "--dry-run")
    assert isinstance(done.exception, UserError)
    assert "16 ranks do not fill nodes of 6" in str(done.exception)


def test_ranks_fill_nodes_or_are_refused() -> None:
    cluster = Cluster(gpus_per_node=4, tasks_per_node=2)
    assert (cluster.nodes(Needs(8, 8)), cluster.tasks(Needs(8, 8))) == (2, 4)
    assert (cluster.nodes(Needs(3, 3)), cluster.tasks(Needs(3, 3))) == (1, 3)
    assert (cluster.nodes(Needs(2)), cluster.tasks(Needs(2))) == (1, 2)
    with pytest.raises(UserError, match="6 ranks do not fill nodes of 4") as told:
        cluster.tasks(Needs(6, 6))
    assert "gpus_per_node" in str(told.value) and "\n" not in str(told.value)


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
