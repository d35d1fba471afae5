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
