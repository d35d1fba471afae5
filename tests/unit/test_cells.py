"""Cells: whole or absent on disk, small, and checked when they are put side by side."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pydantic
import pytest
from cell_factory import make_cell, make_metrics, make_scores
from hypothesis import given
from hypothesis import strategies as st

import benchmarks.evaluation.results
from benchmarks.evaluation.metrics import DRIFT
from benchmarks.evaluation.results import (
    Cell,
    Protocol,
    cells_folder,
    gather_rows,
    load_cell,
    load_cells,
    save_cell,
)
from g2rpo.checksums import parse_document, write_document
from g2rpo.errors import UserError

SCORES = make_scores({"hps": 0.3, "clip": 0.4})


def test_round_trip(tmp_path: Path) -> None:
    folder = cells_folder(tmp_path, "mini", "table1")
    assert folder == tmp_path / "mini" / "table1" / "cells"
    curve = pd.DataFrame({"iteration": [1, 2], "reward/hps/mean": [0.25, 0.5]})
    cell = make_cell("hps/g2rpo", seed=4, scores=SCORES, train=("hps",))
    path = save_cell(Cell(cell.info, cell.scores, curve), folder)
    assert path.name == "hps--g2rpo__seed4.json"
    found = load_cell(path)
    assert found.info == cell.info
    pd.testing.assert_frame_equal(found.scores, cell.scores)
    assert found.curve is not None
    pd.testing.assert_frame_equal(found.curve, curve)
    by_hand = SCORES[SCORES["reward"] == "hps"]["score"].astype("float32").astype("float64")
    assert found.means()["hps"] == pytest.approx(by_hand.mean(), rel=1e-12)


def test_cells_are_listed_by_row_and_seed(tmp_path: Path) -> None:
    for row, seed in [("hps/g2rpo", 10), ("hps/g2rpo", 9), ("base", None)]:
        save_cell(make_cell(row, seed=seed, scores=SCORES), tmp_path)
    names = [cell.info.name for cell in load_cells(tmp_path)]
    assert names == ["base", "hps--g2rpo__seed9", "hps--g2rpo__seed10"]
    assert load_cells(tmp_path / "nowhere") == []


def test_a_cell_of_400_prompts_and_5_rewards_is_small_and_reproducible(tmp_path: Path) -> None:
    ids = [hashlib.sha256(str(n).encode()).hexdigest()[:16] for n in range(400)]
    rng = np.random.default_rng(0)
    scores = pd.concat(
        pd.DataFrame({"prompt_id": ids, "reward": reward, "score": rng.normal(size=400)})
        for reward in ("hps", "clip", "pick_score", "image_reward", "attributes")
    )
    for folder in ("one", "two"):
        save_cell(make_cell("base", seed=None, scores=scores), tmp_path / folder)
    data = (tmp_path / "one" / "base.parquet").read_bytes()
    assert len(data) + (tmp_path / "one" / "base.json").stat().st_size <= 30_000
    assert data == (tmp_path / "two" / "base.parquet").read_bytes()


def test_an_interrupted_save_leaves_no_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    old = make_cell("base", seed=None, scores=SCORES)
    save_cell(old, tmp_path)
    monkeypatch.setattr(benchmarks.evaluation.results, "write_document", killed)
    with pytest.raises(KeyboardInterrupt):
        save_cell(make_cell("base", seed=None, scores=make_scores({"hps": 0.9})), tmp_path)
    assert load_cells(tmp_path) == []
    monkeypatch.undo()
    save_cell(old, tmp_path)
    assert len(load_cells(tmp_path)) == 1


@pytest.mark.parametrize("part", ["base", "base__curve", "base__metrics"])
def test_altered_and_missing_files_are_refused_by_name(tmp_path: Path, part: str) -> None:
    cell = make_cell("base", seed=None, scores=SCORES)
    curve = pd.DataFrame({"iteration": [1, 2]})
    path = save_cell(Cell(cell.info, cell.scores, curve, make_metrics({DRIFT: 1.0})), tmp_path)
    parquet = tmp_path / f"{part}.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-1] + b"x")
    fix = "delete base.json and rerun `g2rpo reproduce`"
    with pytest.raises(UserError, match=rf"{part}\.parquet: does not match the hash.*{fix}"):
        load_cell(path)
    parquet.unlink()
    with pytest.raises(UserError, match=rf"{part}\.parquet: missing.*{fix}"):
        load_cell(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_cell(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ""),
        (b'{"format": 1, "ce', ""),
        (b"\xff\xfe\x00", ""),
        (b"[1, 2]", "not a JSON object"),
        (b"{}", ""),
        (None, r"unknown key 'cell.metod'.*'method'"),
    ],
)
def test_the_error_of_a_damaged_json_has_a_fix(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = save_cell(make_cell("base", seed=None, scores=SCORES), tmp_path)
    if content is None:
        document = parse_document(path.read_bytes())
        document["cell"]["metod"] = "base"
        write_document(path, document)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_cells(tmp_path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert "delete it and rerun `g2rpo reproduce`" in str(error.value)


def test_a_renamed_cell_is_refused(tmp_path: Path) -> None:
    path = save_cell(make_cell("base", seed=None, scores=SCORES), tmp_path)
    with pytest.raises(UserError, match=r"rename the file to base\.json"):
        load_cell(path.rename(tmp_path / "other.json"))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (SCORES.drop(columns="score"), "missing column 'score'"),
        (SCORES.iloc[:0], "no scores"),
        (SCORES.assign(score=float("inf")), "prompt 'p000' under 'clip' is not finite"),
        (pd.concat([SCORES, SCORES.tail(1)]), "prompt 'p019' under 'clip' occurs twice"),
        (SCORES.iloc[1:], "prompt 'p000' has no score under 'hps'"),
    ],
)
def test_bad_scores_are_refused_by_name(scores: pd.DataFrame, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_cell("base", seed=None, scores=scores)


KEYS = st.from_regex(r"[a-z0-9]{1,2}([._/-][a-z0-9]{1,2}){0,2}", fullmatch=True)
INFO = make_cell("base", seed=None, scores=SCORES).info


@given(st.sets(st.tuples(KEYS, st.none() | st.integers(0, 12)), max_size=20))
def test_names_are_unique(rows: set[tuple[str, int | None]]) -> None:
    names = [INFO.model_copy(update={"row": row, "seed": seed}).name for row, seed in rows]
    assert len(set(names)) == len(rows)


@pytest.mark.parametrize("key", ["", "G2RPO", "a b", "a--b", "a__b", "/a", "a/", "../a"])
def test_keys_that_could_not_name_a_file_are_refused(key: str) -> None:
    with pytest.raises(pydantic.ValidationError, match="row"):
        make_cell(key, seed=None, scores=SCORES)


def test_rows_hold_scores_as_plain_loops_find_them() -> None:
    cells = [
        make_cell("g2rpo", seed=seed, scores=make_scores({"hps": 0.3, "clip": 0.4}, seed=seed))
        for seed in (7, 1, 3)
    ]
    row = gather_rows(cells)["g2rpo"]
    assert row.seeds == (1, 3, 7)
    cube = row.scores(["clip", "hps"], seeds=[7, 3])
    assert cube.shape == (2, 2, 20)
    for place, reward in enumerate(["clip", "hps"]):
        for index, cell in enumerate([cells[2], cells[0]]):
            for number, prompt in enumerate(row.prompt_ids):
                table = cell.scores
                found = table[(table["prompt_id"] == prompt) & (table["reward"] == reward)]
                assert cube[place, index, number] == found["score"].item()


def test_cells_that_do_not_belong_together_are_refused() -> None:
    first = make_cell("g2rpo", seed=0, scores=SCORES)
    with pytest.raises(UserError, match="two cells with seed 0"):
        gather_rows([first, first])
    other = Protocol(name="other", hash="x")
    with pytest.raises(UserError, match="differ in their protocol"):
        gather_rows([first, make_cell("g2rpo", seed=1, scores=SCORES, protocol=other)])
    with pytest.raises(UserError, match="differ in their preset: matched and released"):
        gather_rows([first, make_cell("g2rpo", seed=1, scores=SCORES, preset="released")])
    fewer = make_scores({"hps": 0.3}, prompts=19)
    with pytest.raises(UserError, match="different prompts"):
        gather_rows([first, make_cell("g2rpo", seed=1, scores=fewer)])
