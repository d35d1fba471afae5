"""The ranks of a training and what they exchange."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from g2rpo.errors import UserError
from g2rpo.training.config import TrainConfig

Value = TypeVar("Value")


def make_accelerator(config: TrainConfig, run: Path) -> Accelerator:
    """The accelerator for ``config``; ranks come from the launcher's environment.

    Raises:
        UserError: ``execution.device`` is cuda but there is no GPU, or a tracker is not installed.
    """
    device = config.execution.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "execution.device=cuda but no GPU is visible; use execution.device=cpu or auto"
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
    """Each rank's ``value``, ordered by rank. All ranks call it together."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Value] = gather_object([value])
    return values


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Raises a :class:`UserError` of any rank on all ranks, so that none waits for a failed one.

    All ranks enter the block together.

    Raises:
        UserError: the error of the first rank that has one.
    """
    own = None
    try:
        yield
    except UserError as error:
        own = error
    for error_of_rank in of_all_ranks(accelerator, own):
        if error_of_rank is not None:
            raise error_of_rank


def sum_over_ranks(accelerator: Accelerator, values: Mapping[str, float]) -> dict[str, float]:
    """Each value summed over all ranks, in float64."""
    names = sorted(values)
    local = torch.tensor([values[name] for name in names], dtype=torch.float64)
    if accelerator.num_processes == 1:
        return dict(values)
    total = accelerator.reduce(local.to(accelerator.device), reduction="sum")
    return dict(zip(names, total.tolist(), strict=True))
