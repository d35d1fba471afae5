"""Scores images while others are still being decoded.

Threads do the CPU work of reward models (resizing, tokens) as soon as a batch of images is decoded.
On a GPU the batches may also be evaluated right away, in a stream of their own, while the next
images are decoded. The batches are those that ``score`` makes of all images, so the scores are the
same numbers.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from g2rpo.rewards.base import BatchedReward, RewardModel, check_finite, check_inputs

PREPARING_THREADS = 2


def score_slices(
    rewards: Mapping[str, RewardModel],
    slices: Iterable[Tensor],
    prompts: Sequence[str],
    *,
    overlap: bool = False,
) -> dict[str, Tensor]:
    """The scores of N images by reward, float32 [N] each.

    Args:
        rewards: the reward models by column name.
        slices: the images, uint8 [n, H, W, 3] on the CPU, in order.
        prompts: N prompts.
        overlap: evaluates batches while the next images are decoded; only useful on a GPU.

    Raises:
        UserError: as :meth:`RewardModel.score`.
    """
    batched = {n: m for n, m in rewards.items() if isinstance(m, BatchedReward) and in_batches(m)}
    images: list[Tensor] = []
    sent = dict.fromkeys(batched, 0)
    results: dict[str, list[Callable[[], Tensor]]] = {name: [] for name in batched}
    with ThreadPoolExecutor(PREPARING_THREADS) as preparing, ThreadPoolExecutor(1) as evaluating:

        def send(name: str, end: int) -> None:
            model, part = batched[name], slice(sent[name], end)
            prepared = preparing.submit(model.prepare, images[part], prompts[part])
            evaluate = functools.partial(_evaluate, model, prepared, prompts[part], overlap)
            results[name].append(evaluating.submit(evaluate).result if overlap else evaluate)
            sent[name] = end

        try:
            for part in slices:
                texts = prompts[len(images) : len(images) + len(part)]
                for model in batched.values():
                    check_inputs(model.name, part, texts)
                images += list(part)
                for name, model in batched.items():
                    while len(images) - sent[name] >= model.batch_size:
                        send(name, sent[name] + model.batch_size)
            for name in batched:
                if sent[name] < len(images):
                    send(name, len(images))
            scores = {}
            for name in rewards:
                if name in batched:
                    scores[name] = torch.cat([result() for result in results[name]])
                else:
                    scores[name] = rewards[name].score(torch.stack(images), prompts)
                    check_finite(name, scores[name][:, None], prompts)
            return scores
        except BaseException:
            for pool in (preparing, evaluating):  # drops the tasks that have not started
                pool.shutdown(wait=False, cancel_futures=True)
            raise


def in_batches(model: RewardModel) -> bool:
    """Whether the model's batches may be evaluated one by one.

    Not those of an offloaded model, nor of one with a ``score`` of its own: only ``score`` moves
    the networks.
    """
    return (
        isinstance(model, BatchedReward)
        and not model.offloaded
        and type(model).score is BatchedReward.score
    )


def _evaluate(
    model: BatchedReward, prepared: Future[Any], prompts: Sequence[str], aside: bool
) -> Tensor:
    inputs = prepared.result()
    stream = aside and model.device.type == "cuda"
    # Copying the scores to the CPU within the stream waits for the stream.
    with torch.cuda.stream(_side_stream(model.device)) if stream else nullcontext():
        return model.score_prepared(inputs, prompts)[:, 0]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream in which rewards are evaluated on ``device``."""
    return torch.cuda.Stream(device)
