"""A committed cell on the mini world, trained, sampled and scored again."""

import json
from pathlib import Path

import pandas as pd
import pytest
from command_line import g2rpo
from golden import RESULTS

from g2rpo.training.metrics import read_metrics

EXPERIMENT, CELL = "efficient", "hps/efficient"
"""G²RPO at less than half of the cost of its row of Table 1."""
EARLY = 20
"""Iterations until which the learning curve is the committed one: another CPU rounds otherwise,
which grows from 1e-7 to 1e-4 of HPS by then, and is visible at the end."""
TOLERANCE = 0.15
"""At the end, of a reward's standard deviation over prompts (0.06 seen); training moves HPS 0.4."""


@pytest.mark.mini
def test_a_committed_cell_is_reproduced(tmp_path: Path) -> None:
    committed = RESULTS / "mini" / EXPERIMENT / "cells" / f"{CELL.replace('/', '--')}__seed1"
    for verb in ("train", "sample", "score"):
        done = g2rpo(
            tmp_path, verb, EXPERIMENT, CELL, "--profile", "mini", "--seed", "1",
            "--results", "results", timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    told = json.loads(committed.with_suffix(".json").read_text())["cell"]
    run = tmp_path / "results" / "runs" / told["runs"]["train"]
    manifest = json.loads((run / "manifest.json").read_text())
    (scores,) = run.rglob("scores.parquet")
    expected = pd.read_parquet(committed.with_suffix(".parquet"))
    measured = pd.read_parquet(scores)
    curve = pd.read_parquet(f"{committed}__curve.parquet").set_index("iteration")
    rows = {int(row["iteration"]): row for row in read_metrics(run / "metrics.jsonl")}
    for iteration in range(EARLY + 1):
        ours, theirs = rows[iteration], curve.loc[iteration]
        if iteration:
            norm = theirs["gradient_norm"]
            rel = 1e-3 if iteration == 1 else 1e-2
            assert ours["gradient_norm"] == pytest.approx(norm, rel=rel), iteration
        if iteration % 10 == 0:
            reward = theirs["validation/hps"]
            assert ours["validation/hps"] == pytest.approx(reward, abs=5e-4), iteration
    assert set(measured["reward"]) == set(expected["reward"])
    for reward, scores_of in expected.groupby("reward"):
        again = measured.loc[measured["reward"] == reward, "score"]
        assert len(again) == len(scores_of)
        limit = TOLERANCE * scores_of["score"].std()
        assert again.mean() == pytest.approx(scores_of["score"].mean(), abs=limit), reward
    counts = ("images_scored", "rollout_evaluations", "training_forwards", "training_backwards")
    assert {name: manifest["progress"][name] for name in counts} == {
        name: told["cost"][name] for name in counts
    }
