"""The committed results are complete, and profile and tables agree with them."""

import json
from pathlib import Path

import pytest
from golden import EXPERIMENTS, MINI, cells_of, rendered

from reproduce.experiment import load_experiment, load_profile

SEEDS = {1, 2, 3}


STUDIES = [
    "table1", "steps", "eta", "fusion", "granularity", "group", "equal-cost",
    "released-vs-matched", "choices",
]  # fmt: skip


@pytest.mark.parametrize("experiment", STUDIES)
def test_a_study_has_every_cell_at_its_seeds(experiment: str) -> None:
    seeds: dict[str, set[int | None]] = {}
    for cell in cells_of(experiment):
        seeds.setdefault(cell.info.row, set()).add(cell.info.seed)
        assert len(cell.scores["prompt_id"].unique()) == 400
        assert cell.info.provenance.git_dirty is False
    assert seeds.pop("base") == {None}
    wanted = {1} if experiment == "choices" else SEEDS
    assert seeds == dict.fromkeys(set(load_experiment(experiment).cells) - {"base"}, wanted)


def test_credit_was_measured_for_every_method_at_three_seeds() -> None:
    document = json.loads((MINI / "credit" / "credit.json").read_text())
    experiment = load_experiment("credit")
    assert experiment.credit is not None
    assert document["settings"] == experiment.credit.model_dump(mode="json")
    measured = {(cell["row"], cell["seed"]) for cell in document["cells"]}
    assert measured == {(row, seed) for row in experiment.cells for seed in SEEDS}
    assert {cell["provenance"]["git_dirty"] for cell in document["cells"]} == {False}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_committed_texts_are_rendered_from_the_committed_cells(
    experiment: str, tmp_path: Path
) -> None:
    for name, text in rendered(experiment, tmp_path).items():
        assert text == (MINI / experiment / name).read_text(), name


def test_shipped_learning_rates_won_the_trials() -> None:
    means: dict[str, dict[float, float]] = {}
    experiment = load_experiment("tuning")
    for cell in cells_of("tuning"):
        method = cell.info.row.split("/")[0]
        rate = float(experiment.cells[cell.info.row].set["optimization"]["learning_rate"])
        means.setdefault(method, {})[rate] = cell.means()["hps"]
        assert cell.info.seed not in SEEDS
        assert cell.info.provenance.git_dirty is False
    assert {len(trials) for trials in means.values()} == {4}
    best = {method: max(trials, key=lambda rate: trials[rate]) for method, trials in means.items()}
    assert best == load_profile("mini").learning_rates
