"""Scoring beside decoding: the scores are those of all images at once."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.rewards.base import BatchedReward, Images, RewardConfig
from g2rpo.training.scoring import in_batches, score_slices

IMAGES = torch.randint(0, 256, (23, 8, 8, 3), dtype=torch.uint8)
PROMPTS = [f"prompt {index // 5}" for index in range(23)]


class Slow(BatchedReward):
    """Mean brightness and the length of the prompt; remembers its batches and threads."""

    name = "slow"

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__("cpu", batch_size, "1", "")
        self.batches: list[int] = []
        self.prepared_in: set[int] = set()
        self.evaluated_in: set[int] = set()

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> "Slow":
        return cls()

    def prepare(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Any:
        self.prepared_in.add(threading.get_ident())
        return torch.stack(list(images)).float(), [len(prompt) for prompt in prompts]

    def evaluate(self, prepared: Any) -> Tensor:
        self.evaluated_in.add(threading.get_ident())
        images, lengths = prepared
        self.batches.append(len(images))
        return images.mean((1, 2, 3)) + torch.tensor(lengths)


class Own:
    """A reward model of one's own, which knows nothing of batches."""

    name, version, weights_hash = "own", "1", ""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        self.calls.append(len(images))
        assert isinstance(images, Tensor)
        return images.float().amax((1, 2, 3))


def slices(*sizes: int) -> Iterator[Tensor]:
    yield from torch.split(IMAGES, list(sizes))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sizes", [(23,), (3,) * 7 + (2,), (1,) * 23, (20, 3)])
def test_scores_and_batches_are_those_of_all_at_once(overlap: bool, sizes: tuple[int, ...]) -> None:
    slow, own = Slow(), Own()
    found = score_slices({"a": slow, "b": own}, slices(*sizes), PROMPTS, overlap=overlap)
    reference = Slow()
    assert list(found) == ["a", "b"]
    assert torch.equal(found["a"], reference.score(IMAGES, PROMPTS))
    assert torch.equal(found["b"], Own().score(IMAGES, PROMPTS))
    assert slow.batches == reference.batches == [4, 4, 4, 4, 4, 3]
    assert own.calls == [23]
    here = threading.get_ident()
    assert here not in slow.prepared_in
    assert (here in slow.evaluated_in) is not overlap


def test_with_overlap_batches_are_evaluated_while_images_are_still_to_come() -> None:
    slow, scored = Slow(), threading.Event()
    evaluate = slow.evaluate

    def telling(prepared: Any) -> Tensor:
        values = evaluate(prepared)
        scored.set()
        return values

    slow.evaluate = telling  # type: ignore[method-assign]

    def waiting() -> Iterator[Tensor]:
        yield IMAGES[:10]
        assert scored.wait(timeout=600)
        yield IMAGES[10:]

    found = score_slices({"a": slow}, waiting(), PROMPTS, overlap=True)
    assert torch.equal(found["a"], Slow().score(IMAGES, PROMPTS))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failure_is_raised_and_nothing_hangs(overlap: bool) -> None:
    slow = Slow()
    slow.evaluate = lambda prepared: torch.full((len(prepared[0]),), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"slow: score .* not finite for prompt 'prompt 0'"):
        score_slices({"a": slow}, slices(8, 15), PROMPTS, overlap=overlap)

    def failing() -> Iterator[Tensor]:
        yield IMAGES[:8]
        raise UserError("the decoder failed")

    with pytest.raises(UserError, match="the decoder failed"):
        score_slices({"a": Slow()}, failing(), PROMPTS, overlap=overlap)
    with pytest.raises(UserError, match="uint8"):
        score_slices({"a": Slow()}, [IMAGES.float()], PROMPTS, overlap=overlap)


def test_a_model_that_scores_in_its_own_way_is_left_to_it() -> None:
    class Special(Slow):
        def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
            return torch.zeros(len(images))

    assert in_batches(Slow())
    assert not in_batches(Special())
    assert not in_batches(Own())
    found = score_slices({"a": Special()}, slices(23), PROMPTS)
    assert not found["a"].any()
