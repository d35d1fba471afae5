"""The speed benchmark of the reward models, on toys: it runs, it compares before it believes."""

import pytest
import torch
from torch import Tensor

from benchmarks.speed import rewards as speed
from benchmarks.speed.rewards import Rival, Work
from g2rpo.errors import UserError

NAMES = {
    "hps": ["g2rpo", "hpsv2.score", "hpsv2's model, by image"],
    "clip": ["g2rpo", "open_clip, by image"],
    "pick_score": ["g2rpo", "transformers, by image"],
    "image_reward": ["g2rpo", "ImageReward's score, by image"],
}


def work() -> Work:
    return speed.make_work("small", 6, 2, torch.device("cpu"))


@pytest.mark.parametrize("reward", list(NAMES))
def test_each_package_gives_our_scores(
    reward: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[speed.Line] = []
    show = speed.show
    monkeypatch.setattr(
        speed, "show", lambda found, *rest: (lines.extend(found), show(found, *rest))
    )
    speed.main(size="small", images=6, prompts=2, rewards=reward, device="cpu")
    told = capsys.readouterr().out
    assert [line.name for line in lines] == NAMES[reward]
    assert all(name in told for name in NAMES[reward])
    assert "cpu, 1 threads, float32" in told and "DIFFERS" not in told
    assert all(line.seconds > 0 for line in lines) and lines[0].difference is None
    for line in lines[1:]:
        assert line.difference is not None and line.difference < 1e-5


def test_another_score_is_not_compared_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(rival: Rival, given: Work) -> tuple[float, list[float]]:
        seconds, scores = timed(rival, given)
        return seconds, [score + 1e-3 for score in scores]

    timed = speed._time_rival
    monkeypatch.setattr(speed, "_time_rival", off)
    with pytest.raises(SystemExit) as stopped:
        speed.main(size="small", images=4, prompts=2, rewards="clip", device="cpu")
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert "DIFFERS" in told.out
    assert "scores differ by more than" in told.err


def test_constant_scores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        def score(self, images: Tensor, prompts: list[str]) -> Tensor:
            return torch.ones(len(images))

    monkeypatch.setattr(speed, "load_reward", lambda config, device: Constant())
    with pytest.raises(UserError, match="constant"):
        speed.run("clip", work())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"images": 5, "prompts": 2}, "no multiple"),
        ({"rewards": "hsp"}, "'hps'"),
        ({"size": "smal"}, "'small'"),
        ({"device": "tpu9"}, "no such kind of device"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: dict[str, object], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = {"size": "small", "images": 4, "prompts": 2, "rewards": "clip", "device": "cpu"}
    with pytest.raises(SystemExit) as stopped:
        speed.main(**(defaults | arguments))  # type: ignore[arg-type]
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ") and "\n" not in line and told in line
