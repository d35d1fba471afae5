"""``make bench-rewards``, with tiny models."""

import json
from pathlib import Path

import torch

from benchmarks.speed.rewards import SCORED, main


def test_packages_and_our_scoring_give_the_same_scores(tmp_path: Path) -> None:
    main(2, ",".join(SCORED), "cpu", 1, True, tmp_path)
    result = json.loads((tmp_path / "rewards.json").read_text())
    assert [row["reward"] for row in result["rewards"]] == list(SCORED)
    for row in result["rewards"]:
        assert row["difference"] < 1e-5
        assert row["package"] > 0 < row["ours"]
        assert 0 <= row["waiting"] <= 1
    assert "image_reward" in (tmp_path / "rewards.md").read_text()
    assert result["threads"] == torch.get_num_threads()
