"""``make bench-rewards``, with tiny models."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.rewards import SCORED, main
from g2rpo.errors import UserError


def measured(output: Path, rewards: str) -> dict[str, Any]:
    main(2, rewards, "cpu", 1, 16, output)
    rows = json.loads((output / "rewards.json").read_text())["rewards"]
    return {row["reward"]: row for row in rows}


def test_packages_and_our_scoring_give_the_same_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"reward_vlms.TOKENS": 4096, "reward_vlms.ROWS": 4224, "rewards.SIDE": 256}
    for name, value in small.items():
        monkeypatch.setattr(f"benchmarks.speed.{name}", value)
    rows = measured(tmp_path, ",".join(reversed(SCORED)))
    assert list(rows) == list(SCORED)
    for row in rows.values():
        assert row["difference"] < 1e-5
        assert row["package"] > 0 < row["ours"]
        assert 0 <= row["waiting"] <= 1
    page = (tmp_path / "rewards.md").read_text()
    assert page.count("**reduced**: 1/16") == len(SCORED)
    again = measured(tmp_path, "aesthetic")
    assert again["aesthetic"]["ratios"] != rows["aesthetic"]["ratios"]
    assert again | {"aesthetic": rows["aesthetic"]} == rows  # the other rows stay


def test_other_rewards_and_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reward 'hpsv2' here; did you mean 'hps"):
        main(2, "hpsv2", "cpu", 1, 16, tmp_path)
    with pytest.raises(UserError, match="--divide: 3 is not one of 1, 2, 4, 8, 16"):
        main(2, "clip", "cpu", 1, 3, tmp_path)
