"""The committed results: whole, what they say they are, and what README and profile say of them."""

import json
from itertools import dropwhile, takewhile
from pathlib import Path

import pytest
from golden import EXPERIMENTS, MINI, cells_of, rendered

from reproduce.experiment import ROOT, load_experiment, load_profile

SEEDS = {1, 2, 3}


def test_table_1_has_every_cell_at_three_seeds() -> None:
    seeds: dict[str, set[int | None]] = {}
    for cell in cells_of("table1"):
        seeds.setdefault(cell.info.row, set()).add(cell.info.seed)
        assert len(cell.scores["prompt_id"].unique()) == 400
    assert seeds.pop("base") == {None}
    rows = set(load_experiment("table1").cells) - {"base"}
    assert seeds == dict.fromkeys(rows, SEEDS)


STUDIES = [
    "steps", "eta", "fusion", "granularity", "group", "equal-cost", "released-vs-matched",
]  # fmt: skip


@pytest.mark.parametrize("experiment", STUDIES)
def test_a_study_has_every_cell_at_three_seeds(experiment: str) -> None:
    seeds: dict[str, set[int | None]] = {}
    for cell in cells_of(experiment):
        seeds.setdefault(cell.info.row, set()).add(cell.info.seed)
    assert seeds.pop("base") == {None}
    assert seeds == dict.fromkeys(set(load_experiment(experiment).cells) - {"base"}, SEEDS)


def test_the_study_of_single_choices_has_every_cell_at_one_seed() -> None:
    rows = {(cell.info.row, cell.info.seed) for cell in cells_of("choices")}
    trained = set(load_experiment("choices").cells) - {"base"}
    assert rows == {("base", None), *((row, 1) for row in trained)}


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


def test_cells_were_made_by_committed_code() -> None:
    for experiment in ("table1", "tuning", "choices", *STUDIES):
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


def read_markdown_table(text: str) -> list[dict[str, str]]:
    """The first table of a Markdown text, a dictionary for each row."""
    from_table = dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    lines = takewhile(lambda line: line.startswith("|"), from_table)
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_readme_shows_the_committed_table() -> None:
    """Every row, with some of its columns."""
    committed = read_markdown_table((MINI / "table1" / "table1.md").read_text())
    shown = read_markdown_table((ROOT / "README.md").read_text())
    spec = load_experiment("table1").table_spec(load_profile("mini"))
    assert len(shown) == len(committed) == len(spec.rows)
    wanted = {column.label for column in spec.columns}
    assert wanted <= shown[0].keys() <= committed[0].keys()
    for row, whole in zip(shown, committed, strict=True):
        assert row == {name: whole[name] for name in row}
