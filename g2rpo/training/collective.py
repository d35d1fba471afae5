"""The ranks of a training, and the decisions that they take together."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from g2rpo.errors import UserError
from g2rpo.stop import StopReason
from g2rpo.training.config import TrainConfig

Value = TypeVar("Value")


def make_accelerator(config: TrainConfig, run: Path) -> Accelerator:
    """The accelerator for ``config``; ranks come from the launcher's environment.

    Raises:
        UserError: a CUDA device is asked for and none is there.
    """
    device = config.execution.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "execution.device is cuda but no GPU is visible; use execution.device=cpu or auto"
        )
    tracker = "tensorboard" if config.execution.tensorboard else None
    return Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        log_with=tracker,
        project_dir=str(run) if tracker else None,
    )


def of_all_ranks(accelerator: Accelerator, value: Value) -> list[Value]:
    """Each rank's ``value``, in the order of the ranks; with one rank nothing is exchanged."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Value] = gather_object([value])
    return values


def raise_on_all_ranks(accelerator: Accelerator, error: UserError | str | None) -> None:
    """Raises on every rank if any rank has an ``error``, so that none waits for another.

    Raises:
        UserError: the first rank's error or message.
    """
    for found in of_all_ranks(accelerator, error):
        if found is not None:
            raise found if isinstance(found, UserError) else UserError(found)


@dataclass(frozen=True)
class RankStatus:
    """What one rank, or all of them, say between two iterations.

    Attributes:
        error: what is wrong.
        stop: why the training is to stop.
        due: whether it is time for a checkpoint.
        written: whether what was to be written in the background is.
    """

    error: UserError | None = None
    stop: StopReason | None = None
    due: bool = False
    written: bool = True


def sync_ranks(accelerator: Accelerator, turn: RankStatus) -> RankStatus:
    """What holds for all ranks: a stop or a checkpoint that any of them wants.

    Raises:
        UserError: the first rank's error, on every rank.
    """
    turns = of_all_ranks(accelerator, turn)
    for one in turns:
        if one.error is not None:
            raise one.error
    stops = [one.stop for one in turns if one.stop is not None]
    # Where one of them wants to be resumed, the run is.
    stop = max(stops, key=lambda reason: reason.resume, default=None)
    return RankStatus(
        stop=stop,
        due=any(one.due for one in turns),
        written=all(one.written for one in turns),
    )


def agree(accelerator: Accelerator, value: bool) -> bool:
    """Whether ``value`` holds on every rank."""
    return all(of_all_ranks(accelerator, value))


def sum_over_ranks(accelerator: Accelerator, values: Mapping[str, float]) -> dict[str, float]:
    """Each value summed over all ranks, in float64."""
    names = sorted(values)
    local = torch.tensor([values[name] for name in names], dtype=torch.float64)
    if accelerator.num_processes == 1:
        return dict(values)
    total = accelerator.reduce(local.to(accelerator.device), reduction="sum")
    return dict(zip(names, total.tolist(), strict=True))
