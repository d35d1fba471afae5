"""How many states and images a rollout takes at once: as many as fit, the same on all ranks."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator

from g2rpo.batching import BatchSize
from g2rpo.files import write_json
from g2rpo.policy import FluxPolicy
from g2rpo.policy.decoding import decode_size
from g2rpo.stop import Stopped
from g2rpo.training.collective import of_all_ranks

logger = logging.getLogger(__name__)

LARGEST = 64
"""States at once under ``auto``, however many would fit: no GPU gains from more at FLUX's size."""
STATE_UNITS = 24
"""Estimated peak of a forward without gradients, per state, in units of one block's output (tokens
times width). A single-stream block holds about 15 while it attends (residual, norm, MLP, q, k, v
and their rotation in float32) and 12 while it projects; the rest is allowance. Not measured: where
it is too small, memory runs out once and the size is halved."""
USED_SHARE = 0.8
"""Of the memory that is free; the rest is for latents, noise, fragments and the decoder."""
SIZE_FILE = "rollout_micro_batch.json"
"""In the run folder: the size to resume with, where a run had to end for it."""
_HINT = (
    "use policy.dtype=bfloat16, a smaller policy.resolution, execution.offload.rewards=true or a "
    "GPU with more memory"
)


def state_bytes(policy: FluxPolicy) -> int:
    """Estimated memory of one state in a forward without gradients."""
    config = policy.transformer_config
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    tokens = policy.image_tokens + policy.config.max_sequence_length
    dtype: torch.dtype = getattr(torch, policy.config.dtype)
    return STATE_UNITS * tokens * width * dtype.itemsize


def fitting_states(policy: FluxPolicy, free_bytes: int) -> int:
    """How many states should fit into ``free_bytes``, at least 1 and at most ``LARGEST``."""
    return max(1, min(LARGEST, int(USED_SHARE * free_bytes) // state_bytes(policy)))


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors could still take on a GPU, PyTorch's own cache included."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class RolloutSizes:
    """The batch sizes of a run's rollouts.

    A rank whose memory runs out halves its size and goes on; after the rollout all ranks take the
    smallest. Nothing else waits for it, since no rank waits for another within a rollout, but for
    sharded weights that are gathered at every forward: there the others may be waiting anywhere,
    so the run ends and is resumed with half the size.

    Attributes:
        velocity: states per velocity evaluation.
        decode: images per decoding.
    """

    def __init__(
        self,
        states: int | Literal["auto"],
        policy: FluxPolicy,
        run: Path,
        waits: Callable[[], bool] = lambda: False,
    ) -> None:
        """Begins with ``states``, or with an estimate of what fits into the memory that is free.

        Args:
            states: as configured.
            policy: on its device, with everything else that is to stay there.
            run: the run folder.
            waits: whether ranks wait for each other within a velocity evaluation.
        """
        if states == "auto":
            free = free_memory(policy.device)
            states = LARGEST if free is None else fitting_states(policy, free)
        self.velocity: BatchSize = _FittedSize(states, run, waits)
        self.decode = decode_size(policy.config.resolution)
        self.velocity.lower(_recorded(run, states))

    def restore(self, states: int | None, images: int | None) -> None:
        """Goes on with what an earlier start came down to; None where it was not reduced."""
        if states is not None:
            self.velocity.lower(states)
        if images is not None:
            self.decode.lower(images)

    def share(self, accelerator: Accelerator) -> None:
        """All ranks take the smallest size of any. To be called by all of them."""
        sizes = of_all_ranks(accelerator, (self.velocity.states, self.decode.states))
        self.velocity.lower(min(states for states, _ in sizes))
        self.decode.lower(min(images for _, images in sizes))


class _FittedSize(BatchSize):
    """Ends the run where it cannot go on after memory has run out."""

    def __init__(self, states: int, run: Path, waits: Callable[[], bool]) -> None:
        super().__init__(states, "the rollout", _HINT)
        self.run_folder, self.waits = run, waits

    def exhausted(self) -> None:
        """See :meth:`BatchSize.exhausted`.

        Raises:
            Stopped: other ranks may be waiting for this one.
        """
        super().exhausted()
        if self.waits():
            write_json(self.run_folder / SIZE_FILE, {"states": self.states})
            raise Stopped(
                "out of memory in the rollout: it goes on from the last checkpoint, with "
                f"{self.states} states at a time",
                resume=True,
            )


def _recorded(run: Path, otherwise: int) -> int:
    try:
        return int(json.loads((run / SIZE_FILE).read_text())["states"])
    except (OSError, ValueError, KeyError):
        return otherwise
