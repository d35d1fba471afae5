"""The committed results: whole, what they say they are, and what README and profile say of them."""

from pathlib import Path

import pytest

from benchmarks.cells import Cell, load_cells
from reproduce.experiment import ROOT, load_experiment, load_profile
from reproduce.tables import render_table

MINI = ROOT / "results" / "mini"
SEEDS = {1, 2, 3}


def cells_of(experiment: str) -> list[Cell]:
    return load_cells(MINI / experiment / "cells")


def test_table_1_has_every_cell_at_three_seeds() -> None:
    seeds: dict[str, set[int | None]] = {}
    for cell in cells_of("table1"):
        seeds.setdefault(cell.info.row, set()).add(cell.info.seed)
        assert len(cell.scores["prompt_id"].unique()) == 400
    assert seeds.pop("base") == {None}
    rows = set(load_experiment("table1").cells) - {"base"}
    assert seeds == dict.fromkeys(rows, SEEDS)


@pytest.mark.parametrize("experiment", ["table1", "tuning"])
def test_tables_are_rendered_from_the_committed_cells(experiment: str, tmp_path: Path) -> None:
    spec = load_experiment(experiment).table
    written = render_table(spec, cells_of(experiment), profile="mini", output=tmp_path)
    for path in written.values():
        assert path.read_text() == (MINI / experiment / path.name).read_text(), path.name


def test_cells_were_made_by_committed_code() -> None:
    for experiment in ("table1", "tuning", "equal-evaluations"):
        assert {cell.info.provenance.git_dirty for cell in cells_of(experiment)} == {False}


def test_shipped_learning_rates_won_the_trials() -> None:
    means: dict[str, dict[float, float]] = {}
    experiment = load_experiment("tuning")
    for cell in cells_of("tuning"):
        method = cell.info.row.split("/")[0]
        rate = float(experiment.cells[cell.info.row].set["optimization"]["learning_rate"])
        means.setdefault(method, {})[rate] = cell.means()["hps"]
        assert cell.info.seed not in SEEDS
    assert {len(trials) for trials in means.values()} == {4}
    best = {method: max(trials, key=lambda rate: trials[rate]) for method, trials in means.items()}
    assert best == load_profile("mini").learning_rates


def test_the_readme_shows_the_committed_table() -> None:
    table = (MINI / "table1" / "table1.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    readme = (ROOT / "README.md").read_text().splitlines()
    scores = rows[: 2 + len(load_experiment("table1").table.rows)]
    assert [line for line in scores if line not in readme] == []
