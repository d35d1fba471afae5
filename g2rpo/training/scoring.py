"""Scoring of images while others are still being decoded.

What a reward model prepares on the CPU (resizing, tokens) is prepared in threads as soon as a batch
of images is there. On a GPU the batches may also be evaluated at once, in a stream of their own, in
the shadow of the next decode. Batches are the ones that ``score`` would make of all images, so the
scores are the same numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from g2rpo.rewards.base import BatchedReward, RewardModel, check_inputs

PREPARING_THREADS = 2

_Batch = tuple[Tensor, Sequence[str]]


class Scorer:
    """Scores the images of a rollout with every reward model.

    Attributes:
        rewards: the reward models by column name.
        overlap: evaluates batches while the next images are decoded; on a GPU alone, since a CPU
            has nothing to spare meanwhile.
    """

    def __init__(self, rewards: Mapping[str, RewardModel], overlap: bool = False) -> None:
        self.rewards, self.overlap = rewards, overlap

    def score(self, slices: Iterable[Tensor], prompts: Sequence[str]) -> dict[str, Tensor]:
        """The scores of N images by reward, float32 [N] each.

        Args:
            slices: the images, uint8 [n, H, W, 3] on the CPU, as they come.
            prompts: of the N images.

        Raises:
            UserError: as :meth:`RewardModel.score`.
        """
        with ExitStack() as stack:
            preparing = stack.enter_context(ThreadPoolExecutor(PREPARING_THREADS))
            evaluating = stack.enter_context(ThreadPoolExecutor(1)) if self.overlap else None
            ahead = {
                name: _Ahead(model, preparing, evaluating)
                for name, model in self.rewards.items()
                if works_in_two_parts(model)
            }
            stack.callback(_cancel, ahead.values())
            images: list[Tensor] = []
            done = 0
            for part in slices:
                texts = prompts[done : done + len(part)]
                done += len(part)
                if len(ahead) < len(self.rewards):
                    images.append(part)
                for model in ahead.values():
                    model.take(part, texts)
            return {
                name: ahead[name].finish() if name in ahead
                else model.score(torch.cat(images), prompts)
                for name, model in self.rewards.items()
            }  # fmt: skip


def works_in_two_parts(model: RewardModel) -> bool:
    """Whether the model is prepared and evaluated in batches, and does not score in its own way."""
    return isinstance(model, BatchedReward) and type(model).score is BatchedReward.score


def _cancel(ahead: Iterable["_Ahead"]) -> None:
    for model in ahead:
        model.cancel()


class _Ahead:
    """One reward model's batches: gathered, prepared, evaluated."""

    def __init__(
        self, model: RewardModel, preparing: Executor, evaluating: Executor | None
    ) -> None:
        assert isinstance(model, BatchedReward)
        self.model, self.preparing, self.evaluating = model, preparing, evaluating
        self.images: list[Tensor] = []
        self.prompts: list[str] = []
        self.futures: list[Future[Any]] = []
        self.evaluations: list[Callable[[], Tensor]] = []

    def take(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Adds images; whole batches of them go on their way."""
        check_inputs(self.model.name, images, prompts)
        self.images += list(images)
        self.prompts += prompts
        while len(self.images) >= self.model.batch_size:
            self._send(self.model.batch_size)

    def _send(self, size: int) -> None:
        images, prompts = self.images[:size], self.prompts[:size]
        del self.images[:size], self.prompts[:size]
        prepared = self.preparing.submit(self.model.prepare, images, prompts)
        self.futures.append(prepared)
        if self.evaluating is None:
            self.evaluations.append(lambda: self._evaluate(prepared, prompts))
        else:
            evaluated = self.evaluating.submit(self._evaluate_aside, prepared, prompts)
            self.futures.append(evaluated)
            self.evaluations.append(evaluated.result)

    def _evaluate(self, prepared: Future[Any], prompts: Sequence[str]) -> Tensor:
        return self.model.score_prepared(prepared.result(), prompts)[:, 0]

    def _evaluate_aside(self, prepared: Future[Any], prompts: Sequence[str]) -> Tensor:
        if self.model.device.type != "cuda":
            return self._evaluate(prepared, prompts)
        # The scores are copied to the CPU within the stream, which waits for it.
        with torch.cuda.stream(_side_stream(self.model.device)):
            return self._evaluate(prepared, prompts)

    def finish(self) -> Tensor:
        """The scores of all images, [N] on the CPU."""
        if self.images:
            self._send(len(self.images))
        return torch.cat([evaluation() for evaluation in self.evaluations])

    def cancel(self) -> None:
        """Drops what has not begun."""
        for future in self.futures:
            future.cancel()


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream in which rewards are evaluated on ``device``, always the same one."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
