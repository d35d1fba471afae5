"""The batch sizes of a run: as many states and images at once as fit, the same on all ranks."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from g2rpo.batching import BatchSize
from g2rpo.files import write_json
from g2rpo.policy import Policy
from g2rpo.policy.decoding import decode_size
from g2rpo.stop import StoppedAlone
from g2rpo.training.collective import of_all_ranks
from g2rpo.training.config import ExecutionConfig
from g2rpo.training.memory import STATE_UNITS
from g2rpo.training.weights import TrainedWeights, free_bytes

LARGEST = 64
"""States at once under ``auto``, however many would fit: no GPU gains from more at FLUX's size."""
USED_SHARE = 0.8
"""Share of the free memory; the rest is for latents, noise, fragmentation and the decoder."""


def state_bytes(policy: Policy) -> int:
    """Estimated memory of one state in a forward without gradients."""
    forwards = policy.evaluations_per_velocity
    return forwards * STATE_UNITS * policy.model_size.output_bytes(policy.config)


def fitting_states(policy: Policy, free_bytes: int) -> int:
    """How many states should fit into ``free_bytes``: at least 1 and at most ``LARGEST``."""
    return max(1, min(LARGEST, int(USED_SHARE * free_bytes) // state_bytes(policy)))


class RunBatchSize(BatchSize):
    """A batch size of a run whose ranks may be waiting for each other when memory runs out.

    A rank that the others wait for cannot agree on a smaller size with them. It writes half the
    size to the run folder and ends the run, which then resumes with that size.
    """

    def __init__(
        self,
        states: int,
        file: Path,
        what: str,
        hint: str,
        waits: Callable[[], bool],
        device: torch.device,
    ) -> None:
        """Starts with ``states``, or the smaller size that an earlier start left in ``file``.

        ``waits`` says whether other ranks may be waiting for this one; ``what`` and ``hint`` are
        those of :class:`BatchSize`.
        """
        super().__init__(states, what, hint)
        self.file, self.waits, self.device = file, waits, device
        with suppress(OSError, ValueError, KeyError):  # usually there is no such file
            self.lower(int(json.loads(file.read_text())["states"]))

    def halve(self, *, warn: bool = True) -> None:
        """See :meth:`BatchSize.halve`.

        Raises:
            UserError: the size is 1 already.
            StoppedAlone: other ranks may be waiting for this one.
        """
        super().halve(warn=warn)
        if self.waits():
            write_json(self.file, {"states": self.states})
            if self.device.type == "cuda":
                # What this rank has begun with the others never ends: do not wait for it.
                distributed_c10d._abort_process_group()  # noqa: SLF001
            raise StoppedAlone(
                f"out of memory in {self.what}: resuming from the last checkpoint with "
                f"{self.states} states at a time",
                resume=True,
            )


class BatchSizes:
    """The batch sizes of a run.

    Attributes:
        rollout: states per velocity evaluation.
        decode: images per decoding.
        training: states per training forward and backward.
    """

    def __init__(self, config: ExecutionConfig, weights: TrainedWeights, run: Path) -> None:
        """Starts with the configured sizes, or smaller ones kept by an earlier start.

        Everything that stays on the device is there already: ``auto`` measures what is left.
        """
        policy, states = weights.policy, config.rollout_micro_batch
        self.accelerator = weights.accelerator
        if states == "auto":
            cuda = policy.device.type == "cuda"
            states = fitting_states(policy, free_bytes(policy.device)) if cuda else LARGEST
        self.rollout = RunBatchSize(
            states,
            run / "rollout_micro_batch.json",
            "the rollout",
            "use policy.dtype=bfloat16, smaller images (policy.resolution), "
            "execution.offload.rewards=true or a GPU with more memory",
            lambda: weights.waits,
            policy.device,
        )
        self.decode = decode_size(policy.config.pixels)
        self.training = RunBatchSize(
            config.training_micro_batch,
            run / "training_micro_batch.json",
            "training",
            "use execution.gradient_checkpointing=true, execution.offload.rewards=true, "
            "execution.sharding=fsdp2 on more GPUs, or lora",
            lambda: weights.sharded,
            policy.device,
        )
        self._by_field = {
            "rollout_micro_batch": self.rollout,
            "decode_images": self.decode,
            "training_micro_batch": self.training,
        }

    def restore(self, sizes: Mapping[str, Any]) -> None:
        """Lowers the sizes to those of a checkpoint, which may be None, by field."""
        for field, size in self._by_field.items():
            size.lower(sizes[field])

    @property
    def reduced(self) -> dict[str, int]:
        """The reduced sizes, by their field in checkpoints."""
        return {field: size.states for field, size in self._by_field.items() if size.reduced}

    def share_rollout(self) -> None:
        """Lowers the rollout sizes to the smallest of any rank. All ranks call it together."""
        sizes = of_all_ranks(self.accelerator, (self.rollout.states, self.decode.states))
        self.rollout.lower(min(states for states, _ in sizes))
        self.decode.lower(min(images for _, images in sizes))

    def share_training(self, done: bool) -> bool:
        """Whether training fit into every rank's memory; if not, the size is halved.

        All ranks call it together, except with sharded weights, where a rank that is not ``done``
        stops alone.

        Raises:
            UserError: a single state does not fit.
            StoppedAlone: with sharded weights.
        """
        if not done and self.training.waits():
            self.training.halve()  # the others may be waiting anywhere, so it cannot ask them
        if all(of_all_ranks(self.accelerator, done)):
            return True
        self.training.halve(warn=self.accelerator.is_main_process)
        return False
