"""The committed results are complete, and profile and tables agree with them."""

from pathlib import Path

import pytest
from golden import EXPERIMENTS, RESULTS, cells_of, rendered

from reproduce.experiment import load_experiment, load_profile

GROUP = "hps/"
"""The rows of Table 1 that are compared at equal seeds."""


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_committed_cells_are_of_clean_code_and_all_prompts(experiment: str) -> None:
    rows = load_experiment(Path(experiment).name).cells
    for cell in cells_of(experiment):
        assert cell.info.row in rows
        assert cell.info.provenance.git_dirty is False
        prompts = 200 if experiment.endswith("tuning") else 400
        assert len(cell.scores["prompt_id"].unique()) == prompts


@pytest.mark.parametrize("profile", ["mini", "mini-2", "mini-sd3"])
def test_the_methods_of_table_1_have_equal_seeds(profile: str) -> None:
    seeds: dict[str, set[int | None]] = {}
    for cell in cells_of(f"{profile}/table1"):
        seeds.setdefault(cell.info.row, set()).add(cell.info.seed)
    assert seeds.pop("base") == {None}
    rows = [row for row in load_experiment("table1").cells if row.startswith(GROUP)]
    assert len(rows) == 5
    assert {frozenset(seeds[row]) for row in rows} == {frozenset(range(1, len(seeds[rows[0]]) + 1))}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_committed_texts_are_rendered_from_the_committed_cells(
    experiment: str, tmp_path: Path
) -> None:
    for name, text in rendered(experiment, tmp_path).items():
        assert text == (RESULTS / experiment / name).read_text(), name


def test_shipped_learning_rates_won_the_trials() -> None:
    means: dict[str, dict[float, float]] = {}
    for name in ("tuning", "family-tuning"):
        trials = load_experiment(name).cells
        for cell in cells_of(f"mini/{name}"):
            method = cell.info.row.split("/")[0]
            rate = float(trials[cell.info.row].set["optimization"]["learning_rate"])
            means.setdefault(method, {})[rate] = cell.means()["hps"]
            assert cell.info.seed == 101  # which no table reports
    assert len({tuple(sorted(trials)) for trials in means.values()}) == 1
    best = {method: max(scores, key=lambda rate: scores[rate]) for method, scores in means.items()}
    assert best == load_profile("mini").learning_rates
    for method, scores in means.items():
        assert min(scores) < best[method] < max(scores), f"{method}: the grid is too narrow"
