"""The ranks of a training, and the decisions that they take together."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
        UserError: a CUDA device is asked for and none is there, or a tracker is not installed.
    """
    device = config.execution.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "execution.device is cuda but no GPU is visible; use execution.device=cpu or auto"
        )
    trackers = list(config.execution.trackers)
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(
                f"execution.trackers names {tracker}, which is not installed; "
                f"`.uv/bin/uv pip install {tracker}` installs it"
            )
    return Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        log_with=trackers or None,
        project_dir=str(run / "tensorboard") if trackers else None,
    )


def start_trackers(accelerator: Accelerator, run: Path, iteration: int) -> None:
    """Starts the configured trackers; a resumed run continues its record after ``iteration``."""
    again = {"name": run.name, "resume": "allow"}
    accelerator.init_trackers(
        "g2rpo",
        init_kwargs={
            "tensorboard": {"purge_step": iteration + 1},
            "wandb": again | {"id": run.name, "dir": str(run)},
            "trackio": again,
        },
    )


def of_all_ranks(accelerator: Accelerator, value: Value) -> list[Value]:
    """Each rank's ``value``, in the order of the ranks; with one rank nothing is exchanged."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Value] = gather_object([value])
    return values


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """A :class:`UserError` inside of the block on any rank is raised on every rank after it.

    All ranks enter the block together, so that none waits for one that has failed.

    Raises:
        UserError: the first rank's error.
    """
    error = None
    try:
        yield
    except UserError as found:
        error = found
    for found_by_rank in of_all_ranks(accelerator, error):
        if found_by_rank is not None:
            raise found_by_rank


@dataclass(frozen=True)
class RankStatus:
    """What one rank, or all of them, say between two iterations.

    Attributes:
        stop: why the training is to stop.
        due: whether it is time for a checkpoint.
        written: whether everything that is written in the background is.
    """

    stop: StopReason | None = None
    due: bool = False
    written: bool = True


def sync_ranks(accelerator: Accelerator, status: RankStatus) -> RankStatus:
    """The status of all ranks: a stop or a checkpoint that any of them wants."""
    found = of_all_ranks(accelerator, status)
    stops = [one.stop for one in found if one.stop is not None]
    # Where one of them wants to be resumed, the run is.
    stop = max(stops, key=lambda reason: reason.resume, default=None)
    return RankStatus(
        stop=stop,
        due=any(one.due for one in found),
        written=all(one.written for one in found),
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
