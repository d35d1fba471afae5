"""The configuration of a training run, stored with the run and hashed into its name."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from g2rpo.config import StrictModel, unhashed
from g2rpo.errors import UserError
from g2rpo.flow.rollout_tree import recorded_steps
from g2rpo.flow.schedule import GridConfig
from g2rpo.methods.base import Method, RolloutShape, iterations_by_rollout, parse_method
from g2rpo.offload import OffloadConfig
from g2rpo.policy import LoraConfig, PolicyConfig
from g2rpo.policy.config import ContinuationConfig, ImageConfig
from g2rpo.policy.kernels import Attention
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.registry import check_reward_name
from g2rpo.training.advantages import AdvantageConfig
from g2rpo.training.forward import ForwardObjective, FrozenPolicy, OldPolicyConfig
from g2rpo.training.objective import Clipped
from g2rpo.training.objectives import AnyObjective, parse_objective

Beta = Annotated[float, Field(ge=0, lt=1)]
LARGEST_CLIP = 100.0
"""Largest ``advantage.clip`` where it divides advantages; normalised ones rarely reach 10."""


def _method(value: Any) -> Method:
    try:
        return parse_method(value)
    except UserError as error:
        raise ValueError(str(error)) from None


class PromptsConfig(StrictModel):
    """The training prompts."""

    file: str
    """Text file with one prompt per line."""
    limit: int | None = Field(None, ge=1)
    """Uses only the first ``limit`` prompts; null uses all."""


class TrainingReward(StrictModel):
    """A training reward."""

    reward: RewardConfig
    weight: float = Field(1.0, gt=0)

    @field_validator("reward")
    @classmethod
    def _registered(cls, value: RewardConfig) -> RewardConfig:
        try:
            check_reward_name(value.model)
        except UserError as error:
            raise ValueError(str(error)) from None
        return value


class RolloutConfig(StrictModel):
    """The number of samples per iteration."""

    group_size: int = Field(12, ge=2)
    """Samples per group G; a group of 1 has no advantage."""
    prompts_per_iteration: int = Field(16, ge=1)
    """Prompts over all ranks (the paper: one on each of 16 GPUs)."""


class GuidanceConfig(StrictModel):
    """The guidance of velocities in training; rollouts have ``policy.guidance_scale``."""

    training_scale: float | None = Field(None, ge=0)
    """The guidance scale in training; null uses that of rollouts. Only an objective on the forward
    process may have another (1 for none): the ratio of transitions needs the same velocity."""
    detach_unconditional: bool = False
    """Classifier-free guidance without a gradient through the velocity of the empty prompt: the
    gradient is the scale times that of the other velocity (Flow-GRPO's code before 2025-08-19)."""


class OptimizationConfig(StrictModel):
    """The optimiser and the updates of an iteration."""

    iterations: int = Field(300, ge=1, le=1_000_000_000)
    max_device_seconds: float | None = unhashed(None, gt=0)
    """Ends the run early, after the iteration in which the device-seconds of all ranks reach this.
    The result then depends on the machine; null sets no limit."""
    max_equal_cost: int | None = unhashed(None, ge=1)
    """Ends the run early, after the iteration in which rollout evaluations, training forwards and
    twice the backwards, over all ranks, reach this; null sets no limit."""
    optimizer: Literal["adamw", "adamw_8bit"] = unhashed("adamw")
    """``adamw_8bit`` keeps AdamW's two moments in 8 bits (torchao), a quarter of their memory."""
    learning_rate: float = Field(2e-6, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    clip_range: float = Field(1e-4, gt=0)
    """The ratio is clipped to 1 +- this (released flag ``--clip_range 1e-4``), except by the
    objective ``dppo``."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Weight of the KL to the frozen base, per trained step; on the forward process, of the mean
    squared difference of the velocities."""
    update_every: Literal["iteration", "timestep"] = "iteration"
    """``iteration``: one update on the mean loss of all trained steps.
    ``timestep``: one update per trained step, with its loss undivided (released HPS script)."""
    updates_per_iteration: int = Field(1, ge=1)
    """With ``iteration``: the samples of each group are split into this many updates."""
    ema_decay: float | None = Field(None, ge=0, lt=1)
    """Decay of the weights' EMA, which is used for evaluation; null keeps none."""
    ratio_tolerance: float = Field(2e-5, gt=0)
    """Largest deviation of the ratio from 1 before the first update; beyond it the run stops."""


class CheckpointConfig(StrictModel):
    """When checkpoints are written and which are kept."""

    every: int = Field(50, ge=1)
    """Iterations between two checkpoints."""
    every_minutes: float | None = Field(30.0, gt=0)
    """Also writes one when this many minutes have passed since the last; null disables this."""
    keep_last: int = Field(2, ge=1)
    """Never fewer than two are kept: if the last is damaged, the one before it is used."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints at multiples of this are always kept."""

    def kept(self, iterations: Sequence[int]) -> set[int]:
        """Those of the ascending ``iterations`` whose checkpoints are kept."""
        last = set(iterations[-max(2, self.keep_last) :])
        every = self.keep_every
        return {i for i in iterations if i in last or (every is not None and i % every == 0)}


class ValidationConfig(StrictModel):
    """In-domain rewards on fixed prompts and noise during training, for learning curves.

    Training samples are not comparable between methods (they differ in where the noise is and which
    image is scored); these are. Training itself is unaffected.
    """

    file: str
    limit: int = Field(64, ge=1)
    every: int = Field(10, ge=1)
    """Iterations between two validations; there is also one before the first iteration."""
    seed: int = 1223627


class PicturesConfig(ImageConfig):
    """Preview images of fixed prompts and noise during training.

    They are not scored in training, which is unaffected.
    """

    file: str
    limit: int = Field(8, ge=1)
    """Uses the first ``limit`` prompts."""
    every: int = Field(50, ge=1)
    """Iterations between two previews."""
    seed: int = 1223627
    grid: GridConfig = GridConfig()

    def iterations(self, total: int) -> range:
        """The iterations with previews, out of ``total``; base and result have evaluations."""
        return range(self.every, total, self.every)


class ExecutionConfig(StrictModel):
    """Device, batch sizes and kernels of a run; not part of its name."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    rollout_micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """States per velocity evaluation in the rollout; ``auto`` estimates how many fit. Halved when
    memory runs out."""
    training_micro_batch: int = Field(32, ge=1)
    """States per training forward and backward; halved when memory runs out."""
    sharding: Literal["replicated", "fsdp2"] = "replicated"
    """``fsdp2`` shards weights, gradients and optimiser states over the ranks."""
    rollout_weights: Literal["auto", "gathered", "sharded"] = "auto"
    """With ``fsdp2``: gather once per rollout or at every forward; ``auto`` gathers if they fit."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass instead of keeping them."""
    compile: bool = False
    """Compiles the transformer's blocks (about a minute at FLUX's size)."""
    attention: Attention = "auto"
    """The attention kernel of rollout and training; ``auto`` takes one with a backward pass."""
    overlap_rewards: bool = True
    """On a GPU, scores images while the next ones are being decoded."""
    offload: OffloadConfig = OffloadConfig()
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics are logged besides ``metrics.jsonl``, through accelerate."""


class TrainConfig(StrictModel):
    """A whole training run."""

    seed: int = 42
    policy: PolicyConfig
    prompts: PromptsConfig
    rewards: dict[str, TrainingReward] = Field(min_length=1)
    """The in-domain rewards, by column name."""
    grid: GridConfig = GridConfig()
    method: Annotated[SerializeAsAny[Method], BeforeValidator(_method)]
    lora: LoraConfig | None = unhashed(None)
    """Trains adapters; null trains the transformer's own weights."""
    guidance: GuidanceConfig = unhashed(GuidanceConfig())
    approximate_rollout: ContinuationConfig | None = unhashed(None)
    """Approximates continuations, on which no log-prob depends; null computes all exactly."""
    rollout: RolloutConfig = RolloutConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    objective: Annotated[AnyObjective, BeforeValidator(parse_objective)] = unhashed(Clipped())
    """The loss: of transitions (``clipped``, ``guard``, ``dppo``), or of images on the forward
    process (``nft``, ``awm``, ``dgpo``)."""
    optimization: OptimizationConfig = OptimizationConfig()
    validation: ValidationConfig | None = None
    pictures: PicturesConfig | None = unhashed(None)
    """Preview images between base and result; null keeps none."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    execution: ExecutionConfig = ExecutionConfig()

    @property
    def shape(self) -> RolloutShape:
        """The sizes that the method's rollout depends on."""
        return RolloutShape(
            self.grid.steps, self.rollout.group_size, self.optimization.iterations, self.seed
        )

    @property
    def title(self) -> str:
        """The method's name; the objective's if the rollout is plain sampling."""
        return (self.method if self.method.records_transitions else self.objective).name

    @property
    def trained_policy(self) -> PolicyConfig:
        """The policy with the guidance of training."""
        scale = self.guidance.training_scale
        if scale is None:
            return self.policy
        return self.policy.model_copy(update={"guidance_scale": scale})

    @property
    def frozen_policies(self) -> tuple[FrozenPolicy, ...]:
        """The policies without training whose velocities the loss needs."""
        objective, optimization = self.objective, self.optimization
        needed: set[FrozenPolicy] = {"base"} if optimization.kl_coefficient > 0 else set()
        if isinstance(objective, ForwardObjective):
            needed |= {*objective.frozen(optimization.updates_per_iteration)}
        return tuple(sorted(needed))

    @property
    def old_policy(self) -> OldPolicyConfig | None:
        """The old policy's settings; None if neither the loss nor a rollout uses one."""
        objective = self.objective
        settings = objective.old if isinstance(objective, ForwardObjective) else None
        if settings is None or settings.rollouts_after is not None:
            return settings
        return settings if "old" in self.frozen_policies else None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.method.check(self.shape)
        self._check_objective()
        if self.guidance.detach_unconditional and self.trained_policy.guidance_scale <= 1:
            raise ValueError(
                "guidance.detach_unconditional needs guidance above 1 in training; remove it"
            )
        if self.execution.sharding == "fsdp2" and self.lora is not None:
            raise ValueError(
                "execution.sharding=fsdp2 is not supported with lora, whose adapters are small; "
                "use execution.sharding=replicated, or lora=null for all weights"
            )
        if (
            self.approximate_rollout is not None
            and self.approximate_rollout.merged_lora
            and self.lora is None
        ):
            raise ValueError(
                "approximate_rollout.merged_lora needs lora: there are no adapters to merge"
            )
        size = self.rollout.group_size
        if size - self.advantage.trimmed(size) < 2:
            raise ValueError(
                f"advantage.trimmed_ratio={self.advantage.trimmed_ratio} leaves fewer than two of "
                f"rollout.group_size={size} rewards"
            )
        if self.advantage.trimmed_ratio and any(
            group.share > 1 for group in self.method.rollout_tree(self.shape, 0).groups
        ):
            raise ValueError(
                f"advantage.trimmed_ratio is not supported with {self.method.name}, whose groups "
                "differ in size; use 0"
            )
        updates = self.optimization.updates_per_iteration
        if self.rollout.group_size % updates:
            raise ValueError(
                f"optimization.updates_per_iteration={updates} does not divide "
                f"rollout.group_size={self.rollout.group_size}"
            )
        if updates > 1 and self.optimization.update_every == "timestep":
            raise ValueError(
                "optimization.updates_per_iteration above 1 needs "
                "optimization.update_every: iteration"
            )
        if updates > 1 and not isinstance(self.objective, ForwardObjective):
            self._check_updates(updates)
        random_subset = type(self.method).trained_steps is not Method.trained_steps
        if random_subset and self.optimization.update_every == "timestep":
            raise ValueError(
                f"optimization.update_every: timestep is not supported with {self.method.name}, "
                "which trains different steps for each sample; use iteration"
            )
        return self

    def _check_updates(self, updates: int) -> None:
        """Rejects updates to which a rollout may give nothing to train, whatever its rewards."""
        shape, method = self.shape, self.method
        any_rewards = torch.zeros(1, shape.group_size)
        for iteration in iterations_by_rollout(method, shape):
            tree = method.rollout_tree(shape, iteration)
            masks = {s: method.selected(shape, s, any_rewards) for s in recorded_steps(tree)}
            whole = {step for step, mask in masks.items() if mask is None or bool(mask.all())}
            states = (tree.states[place] for place in tree.recorded)
            samples = (s.sample for s in states if s.step in whole and s.sample is not None)
            if len({sample * updates // shape.group_size for sample in samples}) < updates:
                raise ValueError(
                    f"optimization.updates_per_iteration={updates}: an update of iteration "
                    f"{iteration + 1} may have no transition to train; use fewer or prune less"
                )

    def _check_objective(self) -> None:
        """Rejects an objective that this rollout or its updates do not suit."""
        name = f"objective.name={self.objective.name}"
        if isinstance(self.objective, ForwardObjective):
            self._check_forward(self.objective, name)
        else:
            scale = self.trained_policy.guidance_scale
            if scale != self.policy.guidance_scale:
                raise ValueError(
                    f"guidance.training_scale={scale:g} differs from policy.guidance_scale="
                    f"{self.policy.guidance_scale:g}, and the ratio of {name} is that of one "
                    "velocity; remove it, or use objective.name=nft, awm or dgpo"
                )
            if not self.method.records_transitions:
                raise ValueError(
                    f"{name} trains stochastic steps, but method.name={self.method.name} has none; "
                    "use objective.name=nft, awm or dgpo, or another method"
                )

    def _check_forward(self, objective: ForwardObjective, name: str) -> None:
        """Rejects settings that an objective on the forward process does not suit."""
        objective.times.check(self.grid.steps)
        if self.advantage.granularity_reduction != "sum":
            raise ValueError(
                f"advantage.granularity_reduction={self.advantage.granularity_reduction} has no "
                f"effect with {name}, which trains each image with its own advantage; leave it out"
            )
        for setting in self.method.transition_settings:
            if getattr(self.method, setting) is not None:
                raise ValueError(
                    f"method.{setting} has no effect with {name}, which trains on images instead "
                    f"of transitions; use method.{setting}=null"
                )
        if objective.divides_by_clip and self.advantage.clip > LARGEST_CLIP:
            raise ValueError(
                f"{name} divides advantages by advantage.clip={self.advantage.clip:g}, which "
                f"leaves next to nothing of them; use at most {LARGEST_CLIP:g}, e.g. 5"
            )
        if "signal_to_noise" in self.method.measures(0):
            raise ValueError(f"method.adaptive_steps needs an objective on transitions, not {name}")
        if self.optimization.update_every == "timestep":
            raise ValueError(f"{name} needs optimization.update_every: iteration")
        if objective.compares_groups and self.optimization.updates_per_iteration > 1:
            raise ValueError(
                f"{name} compares the images of a whole group; use "
                "optimization.updates_per_iteration: 1"
            )
        if objective.old is None and "old" in self.frozen_policies:
            raise ValueError(
                f"{name} compares with the old policy; leave out objective.old for its default, or "
                "give it settings"
            )
        if not self.method.rollout_tree(self.shape, 0).image_groups:
            raise ValueError(
                f"{name} needs a step whose samples have one image each, and this rollout records "
                "none; prune fewer depths (method.pruned_depths)"
            )

    def notes(self) -> list[str]:
        """Notes on this configuration for the user."""
        return self.method.check(self.shape)
