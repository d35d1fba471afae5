"""What each stage of a cell will take: evaluations, seconds and disk, without loading a model.

Counts follow from the configuration (:mod:`g2rpo.training.counts`), seconds from the speeds of the
profile's machine (``speeds.yaml``), and bytes from the size of the transformer.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.evaluation.protocol import CreditConfig
from g2rpo.data.prompts import read_prompts
from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import credited_to, recorded_steps
from g2rpo.hub.prompt_sets import VALIDATION_PROMPTS, artifact_named
from g2rpo.methods.base import iterations_by_rollout
from g2rpo.policy import PolicyConfig
from g2rpo.policy.size import DTYPE_BYTES, model_size
from g2rpo.training.config import CheckpointConfig, TrainConfig
from g2rpo.training.counts import training_counts, validations
from reproduce.experiment import Hardware, ResolvedCell
from reproduce.jobs.speeds import Seconds, Speeds, speeds_of
from reproduce.stages.shares import WHOLE, Share

PNG_BYTES_PER_PIXEL = 1.9
"""Assumed; 1.5 (1024x1024) and 1.9 (32x32) were seen for smooth images with a little noise."""
SCORE_BYTES = 40
"""Of one score in Parquet with its journal, assumed."""
LOG_BYTES = 4096
"""Of one iteration's metrics, in JSON and for TensorBoard, assumed."""


@dataclass(frozen=True)
class Estimate:
    """What a stage, or several one after the other, will take.

    Attributes:
        device_seconds: seconds that devices (GPUs, or cores where there are none) are held.
        wall_seconds: from its start to its end, without waiting for the devices.
        gpus: at once.
        evaluations: velocity evaluations, and states of training forwards.
        disk_bytes: at most at a time.
        measured: whether all of the seconds come from measured speeds.
    """

    device_seconds: float = 0.0
    wall_seconds: float = 0.0
    gpus: int = 0
    evaluations: int = 0
    disk_bytes: int = 0
    measured: bool = True

    def __add__(self, other: "Estimate") -> "Estimate":
        """Both, one after the other."""
        return Estimate(
            self.device_seconds + other.device_seconds,
            self.wall_seconds + other.wall_seconds,
            max(self.gpus, other.gpus),
            self.evaluations + other.evaluations,
            self.disk_bytes + other.disk_bytes,
            self.measured and other.measured,
        )

    @classmethod
    def total(cls, estimates: Iterable["Estimate"]) -> "Estimate":
        """All, one after the other."""
        return sum(estimates, cls())


class _Clock:
    """Adds up seconds of one device and notices what was not measured."""

    def __init__(self, speeds: Speeds, policy: PolicyConfig) -> None:
        self.speeds, self.seconds = speeds, 0.0
        self.measured = not speeds.stands_in
        operations = model_size(policy).operations(policy)
        self._size = operations / speeds.operations
        self._pixels = (policy.resolution / speeds.resolution) ** 2

    def add(self, count: float, each: Seconds, scale: float = 1.0) -> None:
        if not count:
            return
        self.seconds += count * each.seconds * scale
        self.measured &= not each.estimated and abs(scale - 1.0) < 1e-3

    def evaluations(self, count: int) -> None:
        self.add(count, self.speeds.evaluation, self._size)

    def training(self, count: int) -> None:
        self.add(count, self.speeds.training_state, self._size)

    def decoded(self, images: int) -> None:
        self.add(images, self.speeds.decode, self._pixels)

    def scored(self, images: int, models: Iterable[str]) -> None:
        known = self.speeds.score
        for model in models:
            each = known.get(model)
            if each is None:  # nobody timed it: as slow as the slowest, and not measured
                self.measured = False
                each = max(known.values(), key=lambda one: one.seconds)
            self.add(images, each)

    def started(self, kind: str) -> None:
        each = self.speeds.start.get(kind)
        if each is not None:
            self.add(1, each)

    def written(self, size: float) -> None:
        rate = self.speeds.bytes_per_second
        self.seconds += size / rate.value
        self.measured &= not rate.estimated


def _pictures(config: TrainConfig, clock: _Clock) -> int:
    """Adds the images that a run keeps to look at; gives their velocity evaluations."""
    pictures = config.pictures
    moments = 0 if pictures is None else len(pictures.iterations(config.optimization.iterations))
    if pictures is None or not moments:
        return 0
    images = moments * min(pictures.limit, known_prompts(Path(pictures.file)))
    policy = config.policy.model_copy(update={"resolution": pictures.resolution})
    own = _Clock(clock.speeds, policy)
    own.evaluations(images * pictures.grid.steps)
    own.decoded(images)
    clock.seconds += own.seconds
    clock.measured &= own.measured
    return images * pictures.grid.steps


def training_estimate(config: TrainConfig, hardware: Hardware, speeds: Speeds) -> Estimate:
    """A whole training run.

    Raises:
        UserError: the validation prompts are not there.
    """
    counts, total = training_counts(config), config.optimization.iterations
    ranks = hardware.training_ranks
    rewards = [term.reward.model for term in config.rewards.values()]
    shared, alone = _Clock(speeds, config.policy), _Clock(speeds, config.policy)
    shared.evaluations(counts.rollout_evaluations)
    shared.training(counts.training_backwards)
    shared.evaluations(counts.training_forwards - counts.training_backwards)
    shared.decoded(counts.images_scored)
    shared.scored(counts.images_scored, rewards)
    if speeds.text_in_training:
        shared.add(total * config.rollout.prompts_per_iteration, speeds.text)
    alone.started("train")
    alone.add(total, speeds.iteration)
    evaluations = counts.rollout_evaluations + counts.training_forwards
    validation = config.validation
    if validation is not None:  # one rank validates, the others wait
        prompts = min(validation.limit, known_prompts(Path(validation.file)))
        images = prompts * validations(validation, total)
        alone.evaluations(images * config.grid.steps)
        alone.decoded(images)
        alone.scored(images, rewards)
        evaluations += images * config.grid.steps
    evaluations += _pictures(config, alone)
    one, kept, written = checkpoint_disk(config)
    alone.written(written * one)
    wall = alone.seconds + shared.seconds / ranks
    if config.optimization.max_device_seconds is not None:
        wall = min(wall, config.optimization.max_device_seconds / ranks)
    return Estimate(
        device_seconds=wall * (hardware.gpus or ranks),
        wall_seconds=wall,
        gpus=hardware.gpus,
        evaluations=evaluations,
        disk_bytes=kept * one + LOG_BYTES * total,
        measured=shared.measured and alone.measured,
    )


def credit_estimate(
    config: TrainConfig, credit: CreditConfig, hardware: Hardware, speeds: Speeds
) -> Estimate:
    """The measurement of a method's credit: groups for each step's share, and for the gradients."""
    counts, total = training_counts(config), config.optimization.iterations
    method, prompts = config.method, config.rollout.prompts_per_iteration
    rollouts = min(credit.rollouts, len(iterations_by_rollout(method, config.shape)))
    tree = method.rollout_tree(replace(config.shape, group_size=credit.samples), 0)
    pairs = [tree, *(credited_to(tree, step) for step in recorded_steps(tree))]
    repeats = credit.repeats / total
    evaluations = round(
        rollouts * prompts * sum(part.velocity_evaluations for part in pairs)
        + rollouts * repeats * counts.rollout_evaluations
    )
    images = round(
        rollouts * prompts * sum(len(part.images) for part in pairs)
        + rollouts * repeats * counts.images_scored
    )
    clock = _Clock(speeds, config.policy)
    clock.evaluations(evaluations)
    clock.training(round(rollouts * repeats * counts.training_backwards))
    clock.decoded(images)
    clock.scored(images, [term.reward.model for term in config.rewards.values()])
    wall = clock.seconds / hardware.training_ranks
    return Estimate(
        device_seconds=wall * (hardware.gpus or hardware.training_ranks),
        wall_seconds=wall,
        gpus=hardware.gpus,
        evaluations=evaluations,
        disk_bytes=LOG_BYTES,
        measured=False,
    )


def sampling_estimate(
    cell: ResolvedCell,
    share: Share = WHOLE,
    speeds: Speeds | None = None,
    *,
    reference: bool = False,
) -> Estimate:
    """The sampling of one share of a cell's held-out prompts.

    Args:
        cell: the cell.
        share: which part.
        speeds: by default those of the cell's profile.
        reference: whether it also makes the base's velocities for the drift, as the first share
            of the first trained cell of a protocol does.

    Raises:
        UserError: the prompts are not there and how many there are is not known.
    """
    clock = _Clock(speeds or speeds_of(cell.profile), cell.policy)
    config, total = cell.evaluation, held_out_count(cell)
    prompts = len(share.of(range(total)))
    images = prompts + _further_images(cell, total, share)
    evaluations = images * config.grid.steps
    if config.drift is not None and not cell.is_base and share.first:
        compared = min(config.drift.prompts, total)
        velocities = compared * len(config.drift.sigmas)
        evaluations += velocities
        if reference:
            clock.started("sample")
            evaluations += velocities + compared * config.grid.steps
    clock.started("sample")
    clock.evaluations(evaluations)
    clock.decoded(images)
    clock.add(images, clock.speeds.image_file)
    clock.add(prompts, clock.speeds.text)
    return _on_one_device(cell.profile.hardware, clock, evaluations, images * png_bytes(cell))


def scoring_estimate(
    cell: ResolvedCell, share: Share = WHOLE, speeds: Speeds | None = None
) -> Estimate:
    """The scoring of one share of a cell's images by every judge of the profile.

    Raises:
        UserError: as :func:`sampling_estimate`.
    """
    clock = _Clock(speeds or speeds_of(cell.profile), cell.policy)
    total, rewards = held_out_count(cell), cell.profile.rewards
    prompts = len(share.of(range(total)))
    clock.started("score")
    clock.scored(prompts, [config.model for config in rewards.values()])
    section = cell.evaluation.diversity
    if section is not None and share.first:
        compared = min(section.prompts, total) * section.images
        clock.scored(compared, [rewards[section.features].model])
    return _on_one_device(cell.profile.hardware, clock, 0, prompts * len(rewards) * SCORE_BYTES)


def embedding_estimate(
    prompts: int, policy: PolicyConfig, hardware: Hardware, speeds: Speeds
) -> Estimate:
    """The text embeddings of ``prompts`` prompts, computed and kept in bfloat16."""
    clock = _Clock(speeds, policy)
    clock.started("embed")
    clock.add(prompts, speeds.text)
    return _on_one_device(hardware, clock, 0, prompts * model_size(policy).embedding_bytes(policy))


def rendering_estimate(speeds: Speeds) -> Estimate:
    """Tables, statistics and figures of one experiment, on the CPU."""
    each = speeds.start["render"]
    return Estimate(each.seconds, each.seconds, measured=not each.estimated)


def _on_one_device(hardware: Hardware, clock: _Clock, evaluations: int, disk: float) -> Estimate:
    gpus = hardware.evaluation_devices
    seconds = clock.seconds
    held = seconds * max(1, gpus)
    return Estimate(held, seconds, gpus, evaluations, round(disk), clock.measured)


# Prompts and images


def held_out_count(cell: ResolvedCell) -> int:
    """How many prompts a cell is judged on.

    Raises:
        UserError: as :func:`known_prompts`.
    """
    found, limit = known_prompts(Path(cell.evaluation_prompts)), cell.evaluation.limit
    return found if limit is None else min(limit, found)


def known_prompts(path: Path) -> int:
    """:func:`prompt_count`, or a :class:`UserError` where that is not known."""
    found = prompt_count(path)
    if found is None:
        raise UserError(f"{path}: no such prompt file, so what it will take cannot be told")
    return found


def prompt_count(path: Path) -> int | None:
    """Prompts in a file; of a published list that is not here yet, as the catalogue has it."""
    try:
        found = path.stat()
    except OSError:
        return _published_counts().get("/".join(path.parts[-2:]))
    return _count(path, found.st_ino, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=256)
def _count(path: Path, *state: int) -> int:
    del state
    return len(read_prompts(path))


@functools.cache
def _published_counts() -> dict[str, int]:
    """By the last folder and name that ``g2rpo prompts`` writes a list to."""
    sizes = {name: artifact_named(name).prompts or 0 for name in ("hpdv2-train", "hpdv2-test")}
    return {
        "hpdv2/train.txt": sizes["hpdv2-train"] - VALIDATION_PROMPTS,
        "hpdv2/validation.txt": VALIDATION_PROMPTS,
        "hpdv2/test.txt": sizes["hpdv2-test"],
    }


def _further_images(cell: ResolvedCell, total: int, share: Share) -> int:
    section = cell.evaluation.diversity
    if section is None:
        return 0
    compared = range(min(section.prompts, total))
    return len(share.of(compared)) * (section.images - 1)


def png_bytes(cell: ResolvedCell) -> float:
    """Of one held-out image."""
    return PNG_BYTES_PER_PIXEL * cell.evaluation.resolution**2


# Checkpoints


def checkpoint_bytes(config: TrainConfig) -> int:
    """Of one checkpoint: weights, AdamW's two moments, and twice the weights where EMA is kept.

    What is trained is kept in float32 at least; under LoRA it is the adapters alone.
    """
    size = model_size(config.policy)
    parameters = size.parameters if config.lora is None else size.lora_parameters(config.lora)
    copies = 3 if config.optimization.ema_decay is None else 5
    return copies * parameters * max(4, DTYPE_BYTES[config.policy.dtype])


def checkpoint_disk(config: TrainConfig) -> tuple[int, int, int]:
    """Bytes of one checkpoint, how many there are at most at a time, how many are written."""
    settings = config.checkpoints
    most, written = _checkpoints(settings, config.optimization.iterations)
    return checkpoint_bytes(config), most, written


@functools.lru_cache(maxsize=1024)
def _checkpoints(settings: CheckpointConfig, iterations: int) -> tuple[int, int]:
    """The most at a time, the one being written with them, and how many are written."""
    kept: list[int] = []
    most = written = 0
    for iteration in range(1, iterations + 1):
        if iteration % settings.every and iteration != iterations:
            continue
        kept.append(iteration)
        written += 1
        most = max(most, len(kept))
        kept = sorted(settings.kept(kept))
    return most, written
