"""The table as JSON and BibTeX: the schema, the numbers, and what is cited."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cell_factory import TABLE1, TABLE2, make_table_cells, render

from g2rpo.config import validate
from g2rpo.rewards.registry import REWARDS
from reproduce.experiment import ROOT, load_experiment, load_profile
from reproduce.experiment.table import TableSpec
from reproduce.tables import references
from reproduce.tables.model import METRIC_LABELS, Table
from reproduce.tables.notes import Gap

SPEC = validate(TableSpec, TABLE1, "table1")
MISSING = "hps/mix_grpo"
CELLS = make_table_cells(SPEC, leave_out=(MISSING,))


def document(folder: Path, profile: str = "mini") -> dict[str, Any]:
    texts = render(SPEC, CELLS, folder, profile, (Gap(MISSING, "out of memory"),))
    found: dict[str, Any] = json.loads(texts["json"])
    return found


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return document(tmp_path_factory.mktemp("mini"))


def test_documents_fit_the_schema(mini: dict[str, Any], tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(Table.model_json_schema(mode="serialization"))
    validator.check_schema(validator.schema)
    validator.validate(mini)
    found = document(tmp_path, "flux")
    validator.validate(found)
    for path in (ROOT / "results").glob("*/*/*.json"):
        committed = json.loads(path.read_text())
        if committed.get("format") == found["format"]:
            validator.validate(committed)
    found["rows"][0]["scores"]["hps"]["mean"] = "high"
    assert not validator.is_valid(found)


def test_a_missing_row_says_why(mini: dict[str, Any]) -> None:
    assert [row["key"] for row in mini["rows"]] == [row.key for row in SPEC.rows]
    gap = next(row for row in mini["rows"] if row["key"] == MISSING)
    assert (gap["missing"], gap["scores"], gap["sources"]) == ("out of memory", {}, [])


def test_numbers_are_those_of_the_cells(mini: dict[str, Any]) -> None:
    row = next(row for row in mini["rows"] if row["key"] == "hps/g2rpo")
    cells = [cell for cell in CELLS if cell.info.row == "hps/g2rpo"]
    assert row["seeds"] == [cell.info.seed for cell in cells]
    for name in ("hps", "clip", "attributes"):
        means = [cell.means()[name] for cell in cells]
        assert row["scores"][name]["mean"] == pytest.approx(sum(means) / len(means), rel=1e-6)
        assert row["scores"][name]["in_domain"] == (name == "hps")
    assert [source["cost"]["device_seconds"] for source in row["sources"]] == [
        cell.info.cost.device_seconds for cell in cells if cell.info.cost is not None
    ]
    for source in row["sources"]:
        assert mini["origins"][source["origin"]]["git_commit"] == "c" * 40
        assert source["protocol"] in [protocol["hash"] for protocol in mini["protocols"]]


def test_published_figures_are_marked_as_such(mini: dict[str, Any], tmp_path: Path) -> None:
    assert "another model" in mini["published_source"]
    beside = document(tmp_path, "flux")
    assert {row["label"] for row in beside["published"]} >= {"G²RPO (paper)"}
    assert not any("paper" in row["label"] for row in beside["rows"])


def test_methods_rewards_and_measures_have_references() -> None:
    methods = {path.stem for path in (ROOT / "g2rpo" / "methods").glob("*.yaml")}
    known = set(references.read_bibliography())
    for names, cited in (
        (methods | {"base", "checkpoint"}, references.METHODS),
        (set(REWARDS), references.REWARDS),
        (set(METRIC_LABELS), references.MEASURES),
    ):
        assert set(cited) <= names, "nothing is cited for a name that is not there"
        assert {key for keys in cited.values() for key in keys} <= known
    everywhere = {*references.FOUNDATIONS, *references.STATISTICS, *references.LIBRARIES}
    assert {*everywhere, *references.ON_REQUEST, references.PAPER} <= known
    named = {key for cited in (references.METHODS, references.REWARDS, references.MEASURES)
             for keys in cited.values() for key in keys}  # fmt: skip
    assert known == named | everywhere | {*references.ON_REQUEST, references.PAPER}
    paper = load_experiment("table1")
    for cell in paper.cells.values():
        assert cell.method is None or references.METHODS[cell.method]
    for column in paper.table_spec(load_profile("mini")).columns:
        assert references.REWARDS[column.reward] or column.reward == "attributes"


def test_entries_have_what_a_bibliography_needs() -> None:
    entries = references.read_bibliography()
    for key, text in entries.items():
        assert text.count("{") == text.count("}"), key
        assert all(f"  {field} " in text for field in ("title", "author", "year")), key
        assert any(word in text for word in ("journal ", "booktitle ", "howpublished ")), key
    assert len(entries) == references.BIBLIOGRAPHY.read_text().count("\n@")


def test_a_table_brings_the_entries_it_rests_on(mini: dict[str, Any], tmp_path: Path) -> None:
    assert {"zhou2026g2rpo", "xue2025dancegrpo", "wu2023hpsv2"} <= set(mini["references"])
    assert "kirstain2023pickapic" not in mini["references"]
    spec = validate(TableSpec, TABLE2, "table2")
    texts = render(spec, make_table_cells(spec), tmp_path)
    text = texts["bibtex"]
    assert text.count("\n@") + 1 == len(json.loads(texts["json"])["references"])
    assert "holm1979multiple" in text and "friedman2022vendi" not in text
