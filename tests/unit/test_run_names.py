"""The names of runs: those that committed results state, and how long thousands of them take."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import small_profile_data

from g2rpo.config import content_hash
from g2rpo.data.prompts import read_prompts
from g2rpo.errors import UserError
from g2rpo.files import sha256_file, sha256_tree
from g2rpo.hub.lock import LOCK_VARIABLE
from g2rpo.provenance import source_fingerprint
from g2rpo.training.config import TrainConfig
from reproduce.experiment import ROOT, Experiment, Profile, expand, load_experiment, load_profile
from reproduce.experiment import fingerprint as runs
from reproduce.experiment.layout import Layout

LAYOUT = Layout(Path("runs"), Path("tables"))
COMMITTED = sorted(path.parent.name for path in (ROOT / "results" / "mini").glob("*/cells"))


@pytest.mark.parametrize("experiment", COMMITTED)
def test_committed_cells_keep_their_names(experiment: str) -> None:
    stated = {}
    for path in (ROOT / "results" / "mini" / experiment / "cells").glob("*.json"):
        cell = json.loads(path.read_text())["cell"]
        stated[cell["row"], cell["seed"]] = cell["runs"]
    seeds = sorted({seed for _, seed in stated if seed is not None})
    cells = expand(load_experiment(experiment), load_profile("mini"), seeds)
    names = {
        (cell.key, cell.seed): {
            "train": LAYOUT.training(cell).name,
            "evaluation": LAYOUT.evaluation(cell).name,
        }
        for cell in cells
    }
    assert stated
    assert {key: names[key] for key in stated} == stated


def plain_name(config: TrainConfig) -> str:
    """A run's name, each part of it read and hashed anew."""
    data = config.model_dump(mode="json")
    for section in ("validation", "pictures", "checkpoints", "execution"):
        del data[section]
    for part in (data["policy"], *(term["reward"] for term in data["rewards"].values())):
        del part["revision"]
        part.pop("batch_size", None)
        part["weights"] = sha256_tree(Path(part.pop("source")))
    data["prompts"] = {
        "sha256": sha256_file(Path(config.prompts.file)), "limit": config.prompts.limit,
    }  # fmt: skip
    every = data["optimization"].pop("update_every")  # both were called otherwise at first
    data["optimization"]["optimizer_step"] = {"timestep": "per_step", "iteration": "per_iteration"}[
        every
    ]
    data["algorithm_version"] = runs.ALGORITHM_VERSION
    rewards = "-".join(config.rewards)
    return f"{config.method.name}-{rewards}-seed{config.seed}-{content_hash(data)}"


@pytest.mark.parametrize("experiment", ["table1", "tuning"])
def test_names_under_smoke_are_hashes_of_all_parts(experiment: str, smoke_assets: Path) -> None:
    profile = Profile.model_validate(small_profile_data(smoke_assets))
    cells = expand(load_experiment(experiment), profile, [1, 2])
    trained = [cell.train for cell in cells if cell.train is not None]
    assert [runs.train_run_name(config) for config in trained] == [
        plain_name(config) for config in trained
    ]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red cube\n")
    first = runs.prompts_hash(path)
    assert runs.prompts_hash(path) == first == sha256_file(path)
    path.write_text("a red cube\n\n")
    with pytest.raises(UserError, match="line 2: empty prompt"):
        runs.prompts_hash(path)
    path.unlink()
    with pytest.raises(UserError, match="no such prompt file"):
        runs.prompts_hash(path)


def test_a_pinned_revision_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock.json"
    monkeypatch.setenv(LOCK_VARIABLE, str(lock))
    assert source_fingerprint("owner/name", None) == {"id": "owner/name", "revision": None}
    entry = {"revision": "0" * 40, "files": {}}
    lock.write_text(json.dumps({"version": 1, "repositories": {"owner/name": entry}}))
    assert source_fingerprint("owner/name", None)["revision"] == "0" * 40  # type: ignore[index]
    assert source_fingerprint("owner/name", "main")["revision"] == "main"  # type: ignore[index]


def many_cells(count: int) -> Experiment:
    experiment = load_experiment("table1")
    methods = ("g2rpo", "dance_grpo", "mix_grpo", "flow_grpo")
    cells: dict[str, Any] = {
        f"trial/{number}": {
            "group": "trials",
            "method": methods[number % 4],
            "train": ["hps", "clip"][: 1 + number % 2],
            "set": {"optimization": {"learning_rate": 1e-6 * (number + 1)}},
        }
        for number in range(count)
    }
    data = experiment.model_dump(mode="json")
    return Experiment.model_validate(data | {"cells": data["cells"] | cells})


@pytest.mark.parametrize(("cells", "seeds"), [(300, 1), (30, 10)])
def test_many_cells_are_named_after_reading_each_file_once(
    cells: int, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, profile = many_cells(cells), load_profile("mini")
    read: list[Path] = []

    def counted(path: Path) -> Any:
        read.append(path)
        return read_prompts(path)

    monkeypatch.setattr(runs, "read_prompts", counted)
    runs._prompts_hash.cache_clear()
    resolved = expand(experiment, profile, range(seeds))
    names = {(LAYOUT.training(cell), LAYOUT.evaluation(cell)) for cell in resolved}
    assert len(names) == len(resolved)
    assert len(read) == 2  # training and test prompts, once each
