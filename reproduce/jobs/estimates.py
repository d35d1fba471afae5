"""The cost of each stage of a plan, computed without loading a model.

A stage is a list of parts: counts of velocity evaluations, images and so on (from the
configuration), times the seconds of each on the profile's machine (``speeds.yaml``).
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.evaluation.protocol import CreditConfig
from g2rpo.data.prompts import read_prompts
from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import credited_to, recorded_steps
from g2rpo.hub.prompt_sets import VALIDATION_PROMPTS, artifact_named
from g2rpo.methods.base import iterations_by_rollout
from g2rpo.policy import PolicyConfig
from g2rpo.policy.size import DTYPE_BYTES, model_size, nfe_per_velocity
from g2rpo.training.config import TrainConfig
from g2rpo.training.counts import training_counts, validations
from reproduce.experiment import Profile, ResolvedCell
from reproduce.jobs.speeds import Seconds, Speeds
from reproduce.stages.evaluation_files import WHOLE, Share

PNG_BYTES_PER_PIXEL = 1.9
"""Assumed; 1.5 (1024x1024) and 1.9 (32x32) were measured for smooth images with some noise."""
SCORE_BYTES = 40
"""Per score in Parquet, including its journal; assumed."""
LOG_BYTES = 4096
"""Per iteration of metrics, in JSON and TensorBoard; assumed."""


@dataclass(frozen=True)
class Part:
    """A count of one operation, done sequentially, and the seconds of each."""

    what: str
    count: float
    seconds: float
    measured: bool


@dataclass(frozen=True)
class Estimate:
    """The cost of a stage.

    Attributes:
        parts: what it does.
        devices: the GPUs it holds, or cores if it has none.
        disk_bytes: peak disk usage.
        limit: seconds after which it ends in any case.
    """

    parts: tuple[Part, ...]
    devices: int = 1
    disk_bytes: float = 0.0
    limit: float = math.inf

    @property
    def seconds(self) -> float:
        """Running time, without queueing."""
        return min(self.limit, sum(part.count * part.seconds for part in self.parts))

    @property
    def measured(self) -> bool:
        """Whether all seconds come from measured speeds."""
        return all(part.measured for part in self.parts if part.count)

    def count(self, what: str) -> float:
        """The count of one operation, over all parts."""
        return sum(part.count for part in self.parts if part.what == what)


@dataclass(frozen=True)
class Estimator:
    """The estimates of the stages of one profile.

    Methods raise :class:`UserError` if a prompt file is missing and not a published list.
    """

    profile: Profile
    speeds: Speeds

    def train(self, config: TrainConfig) -> Estimate:
        """A training run: what its ranks share, and what one does while the others wait."""
        counts, total = training_counts(config), config.optimization.iterations
        speeds, hardware, policy = self.speeds, self.profile.hardware, config.policy
        of_base = counts.training_forwards - counts.training_backwards
        texts = total * config.rollout.prompts_per_iteration if speeds.text_in_training else 0
        shared = [
            *self._sampled(policy, counts.rollout_evaluations + of_base, counts.images_scored),
            self._trained(policy, counts.training_backwards),
            *self._scored(counts.images_scored, _rewards(config)),
            self._part("text", texts, speeds.text),
        ]
        checkpoint, kept, written = checkpoint_disk(config)
        alone = [
            *self._started("train"),
            self._part("iteration", total, speeds.iteration),
            self._part("gigabyte", checkpoint * written / 1e9, speeds.gigabyte),
        ]
        if (validation := config.validation) is not None:
            images = min(validation.limit, prompt_count(Path(validation.file)))
            images *= validations(validation, total)
            alone += self._sampled(policy, _nfe(policy, images * config.grid.steps), images)
            alone += self._scored(images, _rewards(config))
        if (pictures := config.pictures) is not None and pictures.iterations(total):
            images = min(pictures.limit, prompt_count(Path(pictures.file)))
            images *= len(pictures.iterations(total))
            shown = policy.at(pictures)
            alone += self._sampled(shown, _nfe(shown, images * pictures.grid.steps), images)
        limit, ranks = config.optimization.max_device_seconds, hardware.training_ranks
        return Estimate(
            (*(replace(part, count=part.count / ranks) for part in shared), *alone),
            hardware.gpus or ranks,
            kept * checkpoint + LOG_BYTES * total,
            math.inf if limit is None else limit / ranks,
        )

    def credit(self, config: TrainConfig, credit: CreditConfig) -> Estimate:
        """A credit measurement: groups for the share of each step, and gradients."""
        counts, hardware = training_counts(config), self.profile.hardware
        tree = config.method.rollout_tree(replace(config.shape, group_size=credit.samples), 0)
        pairs = [tree, *(credited_to(tree, step) for step in recorded_steps(tree))]
        rollouts = min(credit.rollouts, len(iterations_by_rollout(config.method, config.shape)))
        prompts = rollouts * config.rollout.prompts_per_iteration
        repeats = rollouts * credit.repeats / config.optimization.iterations
        velocities = prompts * sum(part.velocity_evaluations for part in pairs)
        evaluations = _nfe(config.policy, velocities)
        images = prompts * sum(len(part.images) for part in pairs) + repeats * counts.images_scored
        parts = [
            *self._sampled(
                config.policy, evaluations + repeats * counts.rollout_evaluations, images
            ),
            self._trained(config.policy, repeats * counts.training_backwards),
            *self._scored(images, _rewards(config)),
        ]
        ranks = hardware.training_ranks
        # Not measured: the first iteration's rollout stands for all of them.
        shared = (replace(part, count=part.count / ranks, measured=False) for part in parts)
        return Estimate(tuple(shared), hardware.gpus or ranks, LOG_BYTES)

    def sample(self, cell: ResolvedCell, share: Share = WHOLE) -> Estimate:
        """Sampling one share of a cell's held-out prompts."""
        config, total = cell.evaluation, held_out_count(cell)
        prompts = len(share.of(range(total)))
        images = prompts * config.images
        if config.diversity is not None:
            compared = share.of(range(min(config.diversity.prompts, total)))
            images += len(compared) * max(0, config.diversity.images - config.images)
        evaluations = images * config.grid.steps
        if config.drift is not None and not cell.is_base and share.first:
            evaluations += min(config.drift.prompts, total) * len(config.drift.sigmas)
        parts = [
            *self._started("sample"),
            *self._sampled(cell.policy, _nfe(cell.policy, evaluations), images),
            self._part("image file", images, self.speeds.image_file),
            self._part("text", prompts, self.speeds.text),
        ]
        return self._evaluation(parts, images * PNG_BYTES_PER_PIXEL * config.pixels)

    def score(self, cell: ResolvedCell, share: Share = WHOLE) -> Estimate:
        """Scoring one share of a cell's images with every reward model of the profile."""
        total, rewards = held_out_count(cell), self.profile.rewards
        images = cell.evaluation.images * len(share.of(range(total)))
        models = [config.model for config in rewards.values()]
        parts = [*self._started("score"), *self._scored(images, models)]
        diversity = cell.evaluation.diversity
        if diversity is not None and share.first:
            compared = min(diversity.prompts, total) * diversity.images
            parts += self._scored(compared, [rewards[diversity.features].model])
        return self._evaluation(parts, images * len(models) * SCORE_BYTES)

    def embed(self, cells: Iterable[ResolvedCell]) -> Estimate:
        """Embedding all prompts: those drawn in training, validation and held-out prompts."""
        policy = self.profile.policy
        files: set[str] = set()
        drawn: dict[tuple[str, int], int] = {}
        for cell in cells:
            policy = cell.policy
            files.add(cell.evaluation_prompts)
            if (train := cell.train) is None:
                continue
            key = (train.prompts.file, train.seed)
            draws = train.optimization.iterations * train.rollout.prompts_per_iteration
            drawn[key] = max(drawn.get(key, 0), draws)
            if train.validation is not None:
                files.add(train.validation.file)
        prompts = sum(prompt_count(Path(file)) for file in files)
        for file in {file for file, _ in drawn}:
            draws = sum(count for (source, _), count in drawn.items() if source == file)
            prompts += min(draws, prompt_count(Path(file)))
        parts = [*self._started("embed"), self._part("text", prompts, self.speeds.text)]
        return self._evaluation(parts, prompts * model_size(policy).embedding_bytes(policy))

    def render(self) -> Estimate:
        """The tables, statistics and figures of one experiment, on the CPU."""
        return Estimate(tuple(self._started("render")))

    def _evaluation(self, parts: Iterable[Part], disk_bytes: float) -> Estimate:
        devices = max(1, self.profile.hardware.evaluation_devices)
        return Estimate(tuple(parts), devices, disk_bytes)

    def _part(self, what: str, count: float, each: Seconds, scale: float = 1.0) -> Part:
        as_measured = not (each.estimated or self.speeds.stands_in) and abs(scale - 1.0) < 1e-3
        return Part(what, count, each.seconds * scale, as_measured)

    def _started(self, kind: str) -> list[Part]:
        each = self.speeds.start.get(kind)
        return [] if each is None else [self._part("start", 1, each)]

    def _size(self, policy: PolicyConfig) -> float:
        return model_size(policy).operations(policy) / self.speeds.operations

    def _sampled(self, policy: PolicyConfig, evaluations: float, images: float) -> list[Part]:
        pixels = policy.pixels / self.speeds.resolution**2
        return [
            self._part("evaluation", evaluations, self.speeds.evaluation, self._size(policy)),
            self._part("decode", images, self.speeds.decode, pixels),
        ]

    def _trained(self, policy: PolicyConfig, states: float) -> Part:
        return self._part("state", states, self.speeds.training_state, self._size(policy))

    def _scored(self, images: float, models: Iterable[str]) -> list[Part]:
        return [self._part(f"score {m}", images, self.speeds.score_of(m)) for m in models]


def _nfe(policy: PolicyConfig, velocities: float) -> float:
    return nfe_per_velocity(policy) * velocities


def _rewards(config: TrainConfig) -> list[str]:
    return [term.reward.model for term in config.rewards.values()]


def held_out_count(cell: ResolvedCell) -> int:
    """The number of prompts a cell is evaluated on."""
    count, limit = prompt_count(Path(cell.evaluation_prompts)), cell.evaluation.limit
    return count if limit is None else min(limit, count)


def prompt_count(path: Path) -> int:
    """The number of prompts in a file; from the catalogue for a published list not fetched yet.

    Raises:
        UserError: the file does not exist and is not a published list.
    """
    if path.exists():
        return _count(path, path.stat().st_mtime_ns)
    published = _published_counts().get("/".join(path.parts[-2:]))
    if published is None:
        raise UserError(f"{path}: no such prompt file")
    return published


@functools.lru_cache(maxsize=256)
def _count(path: Path, changed: int) -> int:
    del changed  # part of the cache key
    return len(read_prompts(path))


@functools.cache
def _published_counts() -> Mapping[str, int]:
    """By the last folder and the name that ``g2rpo prompts`` writes a list to."""
    sizes = {name: artifact_named(name).prompts or 0 for name in ("hpdv2-train", "hpdv2-test")}
    return {
        "hpdv2/train.txt": sizes["hpdv2-train"] - VALIDATION_PROMPTS,
        "hpdv2/validation.txt": VALIDATION_PROMPTS,
        "hpdv2/test.txt": sizes["hpdv2-test"],
    }


def checkpoint_disk(config: TrainConfig) -> tuple[int, int, int]:
    """Bytes of one checkpoint, the most that exist at a time, and the number written.

    A checkpoint has the trained weights, AdamW's two moments, and with EMA two more copies of the
    weights, with an old policy one more, all in float32 at least.
    """
    size = model_size(config.policy)
    trained = size.parameters if config.lora is None else size.lora_parameters(config.lora)
    copies = 3 if config.optimization.ema_decay is None else 5
    copies += config.old_policy is not None
    settings, total = config.checkpoints, config.optimization.iterations
    before_last = range(settings.every, total, settings.every)
    return (
        copies * trained * max(4, DTYPE_BYTES[config.policy.dtype]),
        len(settings.kept(before_last)) + 1,
        len(before_last) + 1,
    )
