"""The speed benchmark of the reward models, on toys: it runs, it compares before it believes."""

import pytest
import torch
from torch import Tensor

from benchmarks.speed import rewards as speed
from benchmarks.speed.reward_rivals import Rival, Work
from g2rpo.errors import UserError

NAMES = {
    "hps": ["g2rpo", "hpsv2.score", "hpsv2's model, by image"],
    "clip": ["g2rpo", "open_clip, by image"],
    "pick_score": ["g2rpo", "transformers, by image"],
    "image_reward": ["g2rpo", "ImageReward's score, by image"],
}


def work(sample: int | None = None) -> Work:
    return speed.make_work("small", 6, 2, torch.device("cpu"), sample)


@pytest.mark.parametrize("reward", list(NAMES))
def test_each_package_gives_our_scores(reward: str) -> None:
    lines = speed.run(reward, work())
    assert [line.name for line in lines] == NAMES[reward]
    assert all(line.seconds > 0 and line.timed == line.calls for line in lines)
    assert lines[0].difference is None
    for line in lines[1:]:
        assert line.difference is not None and line.difference < 1e-5


def test_the_table_has_every_row_and_says_what_is_extrapolated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    speed.main(size="small", images=6, prompts=2, rewards="hps,clip", device="cpu", sample=1)
    told = capsys.readouterr().out
    for name in (*NAMES["hps"], *NAMES["clip"]):
        assert name in told
    assert "hps, hpsv2.score: 1 of 2 calls timed, the rest extrapolated" in told
    assert "clip, open_clip, by image: 1 of 6 calls timed" in told
    assert "cpu, 1 threads, float32" in told
    assert "DIFFERS" not in told


def test_another_score_is_not_compared_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(rival: Rival, given: Work) -> tuple[float, list[float]]:
        seconds, scores = timed(rival, given)
        return seconds, [score + 1e-3 for score in scores]

    timed = speed._time_rival
    monkeypatch.setattr(speed, "_time_rival", off)
    with pytest.raises(SystemExit) as stopped:
        speed.main(size="small", images=4, prompts=2, rewards="clip", device="cpu", sample=None)
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
    defaults = {
        "size": "small", "images": 4, "prompts": 2, "rewards": "clip", "device": "cpu",
        "sample": None,
    }  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        speed.main(**(defaults | arguments))  # type: ignore[arg-type]
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ") and "\n" not in line and told in line
