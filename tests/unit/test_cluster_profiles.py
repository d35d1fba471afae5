"""The bundled cluster profiles: each is valid, and together they show every setting."""

from pathlib import Path
from typing import Any

import pytest

from g2rpo.config import StrictModel, load_yaml
from g2rpo.errors import UserError
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


def test_the_bundled_names_are_suggested() -> None:
    with pytest.raises(UserError, match="did you mean 'h100-pyxis'"):
        load_cluster("h100-pixis")


MISTAKES: dict[str, tuple[str, str]] = {
    "unknown key": ("partitoin: gpu", "partition"),
    "unknown part": ("container: {kind: none, imgae: x}", "image"),
    "unknown limit": ("minutes: {trian: 60}", "train"),
    "newline": ('partition: "gpu\\n#SBATCH --uid=0"', "partition"),
    "newline at the end": ('account: "project\\n"', "account"),
    "newline in a shell line": ('setup: ["module load cuda\\nrm x"]', "setup"),
    "newline in a variable": ('environment: {HF_HOME: "/a\\nb"}', "environment"),
    "name of a variable": ('environment: {"HF HOME": /a}', "environment"),
    "name of a flag": ('extra: {"reservation\\n#SBATCH --uid": 0}', "extra"),
    "flag set by itself": ("extra: {dependency: 'afterok:1'}", "dependency"),
    "no image": ("container: {kind: apptainer}", "image"),
    "no such container": ("container: {kind: docker, image: x}", "container"),
    "no such event": ("mail: {user: me, events: [FAILED]}", "events"),
    "no time": ("minutes: {train: 0}", "minutes.train"),
    "no time to save": ("{minutes: {train: 5}, signal_lead_seconds: 300}", "signal_lead_seconds"),
    "nothing": ("# partition: gpu", "kind: slurm"),
    "no mapping": ("- partition", "expected keys and values"),
}


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


def test_a_missing_profile_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load_cluster(str(tmp_path / "absent.yaml"))


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
    assert load_cluster("debug").kind == "debug"
    monkeypatch.setenv("G2RPO_CLUSTER", "h100-pixis")
    with pytest.raises(UserError, match="h100-pyxis"):
        load_cluster("auto")
