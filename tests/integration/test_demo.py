"""``g2rpo demo`` draws and scores a caption with the base and the committed checkpoint."""

from pathlib import Path

import pytest
from command_line import g2rpo_here, succeeded, told_here
from PIL import Image


def test_both_models_are_drawn_and_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("demo", "a red ring on pink", "--images", "2", "-o", "pair.png")
    lines = succeeded(told_here(capsys, tmp_path, *words)).splitlines()
    assert lines[0].split() == ["reward", "Base", "G²RPO"]
    scores = {line.split()[0]: [float(score) for score in line.split()[1:]] for line in lines[1:6]}
    assert set(scores) == {"HPS", "CLIP", "PickScore", "ImageReward", "Attributes"}
    assert any(base != trained for base, trained in scores.values())
    assert lines[6] == "pair.png"
    with Image.open(tmp_path / "pair.png") as image:
        assert image.width > 2 * 128 and image.height > 2 * 128


def test_a_caption_outside_the_mini_world_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert g2rpo_here(tmp_path, "demo", "a photo of a cat") == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and "a red ring on pink" in errors
    assert not (tmp_path / "demo.png").exists()
