"""The batch sizes of a run: as many states and images at once as fit, the same on all ranks."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed import distributed_c10d

from g2rpo.batching import BatchSize
from g2rpo.files import write_json
from g2rpo.policy import FluxPolicy
from g2rpo.policy.decoding import decode_size
from g2rpo.stop import Stopped, StoppedAlone
from g2rpo.training.collective import of_all_ranks
from g2rpo.training.config import ExecutionConfig

LARGEST = 64
"""States at once under ``auto``, however many would fit: no GPU gains from more at FLUX's size."""
STATE_UNITS = 24
"""Estimated peak of a forward without gradients, per state, in units of one block's output (tokens
times width). A single-stream block holds about 15 while it attends (residual, norm, MLP, q, k, v
and their rotation in float32) and 12 while it projects; the rest is allowance. Not measured: where
it is too small, memory runs out once and the size is halved."""
USED_SHARE = 0.8
"""Of the memory that is free; the rest is for latents, noise, fragments and the decoder."""


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


def _states_that_fit(policy: FluxPolicy) -> int:
    device = policy.device
    if device.type != "cuda":
        return LARGEST
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return fitting_states(policy, free + cached)


class _RunBatchSize(BatchSize):
    """A batch size that a run which has to end for it resumes with: the run folder keeps it."""

    def __init__(self, states: int, file: Path, what: str, hint: str) -> None:
        super().__init__(states, what, hint)
        self.file = file
        with suppress(OSError, ValueError, KeyError):  # mostly there is no such file
            self.lower(int(json.loads(file.read_text())["states"]))

    def keep(self) -> str:
        """Writes the size for the next start; returns the reason to stop."""
        write_json(self.file, {"states": self.states})
        return (
            f"out of memory in {self.what}: it resumes from the last checkpoint with "
            f"{self.states} states at a time"
        )


class RolloutBatchSize(_RunBatchSize):
    """States per velocity evaluation of the rollout.

    A rank whose memory runs out halves its size and carries on, since no rank waits for another
    within a rollout. Sharded weights that are gathered at every forward are the exception: the
    other ranks may be waiting anywhere, so the run ends, to be resumed with half the size.
    """

    def __init__(self, states: int, run: Path, waits: Callable[[], bool] = lambda: False) -> None:
        hint = (
            "use policy.dtype=bfloat16, a smaller policy.resolution, "
            "execution.offload.rewards=true or a GPU with more memory"
        )
        super().__init__(states, run / "rollout_micro_batch.json", "the rollout", hint)
        self.waits = waits

    def halve(self, *, warn: bool = True) -> None:
        """See :meth:`BatchSize.halve`.

        Raises:
            Stopped: other ranks may be waiting for this one.
        """
        super().halve(warn=warn)
        if self.waits():
            raise Stopped(self.keep(), resume=True)


class TrainingBatchSize(_RunBatchSize):
    """States per training forward and backward, the same on all ranks."""

    def __init__(self, states: int, run: Path) -> None:
        hint = (
            "use execution.gradient_checkpointing=true, execution.offload.rewards=true, "
            "execution.sharding=fsdp2 on more GPUs, or lora"
        )
        super().__init__(states, run / "training_micro_batch.json", "training", hint)

    def done_by_all(self, accelerator: Accelerator, done: bool, *, sharded: bool) -> bool:
        """Whether every rank is ``done``, its memory having sufficed; else the size is halved.

        With ``sharded`` weights the others may be waiting for this rank anywhere within the work,
        so that it cannot ask them: the run ends, to be resumed with half the size.

        Raises:
            UserError: a single state does not fit.
            StoppedAlone: with sharded weights.
        """
        if not done and sharded:
            self.halve()
            reason = self.keep()
            if accelerator.device.type == "cuda":
                # What this rank has begun with the others never ends, and is not to be waited for.
                distributed_c10d._abort_process_group()  # noqa: SLF001
            raise StoppedAlone(reason, resume=True)
        if all(of_all_ranks(accelerator, done)):
            return True
        self.halve(warn=accelerator.is_main_process)
        return False


class BatchSizes:
    """The batch sizes of a run.

    Attributes:
        rollout: states per velocity evaluation.
        decode: images per decoding.
        training: states per training forward.
    """

    def __init__(
        self, config: ExecutionConfig, policy: FluxPolicy, run: Path, waits: Callable[[], bool]
    ) -> None:
        """Starts with the configured sizes, or what an earlier start came down to.

        Args:
            config: the configured sizes.
            policy: on its device, with everything else that is to stay there.
            run: the run folder.
            waits: whether ranks wait for each other within a velocity evaluation.
        """
        states = config.rollout_micro_batch
        states = _states_that_fit(policy) if states == "auto" else states
        self.rollout = RolloutBatchSize(states, run, waits)
        self.decode = decode_size(policy.config.resolution)
        self.training = TrainingBatchSize(config.training_micro_batch, run)

    def share(self, accelerator: Accelerator) -> None:
        """All ranks take the smallest rollout sizes of any. To be called by all of them."""
        sizes = of_all_ranks(accelerator, (self.rollout.states, self.decode.states))
        self.rollout.lower(min(states for states, _ in sizes))
        self.decode.lower(min(images for _, images in sizes))
