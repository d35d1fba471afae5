"""From a cell, a profile and a seed to all that a run is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.evaluation.protocol import CreditConfig, EvaluationConfig
from benchmarks.evaluation.results import cell_name
from g2rpo.config import StrictModel, merge, nearest, validate
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.errors import UserError
from g2rpo.methods.presets import load_preset
from g2rpo.policy import CheckpointConfig, PolicyConfig
from g2rpo.rewards.base import RewardConfig
from g2rpo.training.config import TrainConfig
from g2rpo.training.counts import iterations_within, training_counts
from reproduce.experiment.bundled import absolute
from reproduce.experiment.cells import CellConfig, Experiment
from reproduce.experiment.profile import Profile, PromptSplits


class ResolvedCell(StrictModel):
    """One cell at one seed, ready to run.

    As JSON it is without its profile, which all cells of a submission share.

    Attributes:
        key: its row.
        seed: the training seed; None where nothing is trained.
        preset: the preset it was resolved under; None where nothing is trained.
        method: method name, ``base`` or ``checkpoint``.
        train: the training configuration; None where nothing is trained.
        policy: the policy to evaluate, at the protocol's resolution and guidance.
        evaluation: the protocol.
        evaluation_prompts: the held-out prompt file.
        profile: the profile.
        train_rewards: the rewards behind the weights, by column name, as far as they are known.
        checkpoint: weights trained elsewhere, for a cell that loads them.
        credit: how the credit of its rollouts is measured, where that is what is asked.
    """

    key: str
    seed: int | None
    preset: str | None
    method: str
    train: TrainConfig | None
    policy: PolicyConfig
    evaluation: EvaluationConfig
    evaluation_prompts: str
    profile: Profile = Field(exclude=True, repr=False)
    train_rewards: tuple[str, ...] = ()
    checkpoint: CheckpointConfig | None = None
    credit: CreditConfig | None = None

    @property
    def name(self) -> str:
        """Its name in files."""
        return cell_name(self.key, self.seed)

    @property
    def label(self) -> str:
        """What people call it."""
        return self.key if self.seed is None else f"{self.key}, seed {self.seed}"

    @property
    def is_base(self) -> bool:
        """Whether its weights are the base's own."""
        return self.train is None and self.checkpoint is None

    def held_out_prompts(self) -> list[Prompt]:
        """The prompts that it is judged on."""
        return read_prompts(Path(self.evaluation_prompts), self.evaluation.limit)


LENGTHENED = 2
"""How many times its iterations a training may have that ends at device-seconds."""


def _located(config: CheckpointConfig | None) -> CheckpointConfig | None:
    if config is None:
        return config
    return config.model_copy(update={"source": absolute(config.source)})


class Resolver:
    """Resolves the cells of one experiment under one profile.

    An experiment may have thousands of cells: what they share is made and validated once.
    """

    def __init__(
        self,
        experiment: Experiment,
        profile: Profile,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepares what all cells share.

        Args:
            experiment: whose cells.
            profile: at which scale.
            overrides: changes to the training configuration of every cell.

        Raises:
            UserError: the profile does not hold the policy that the experiment is about.
        """
        wanted = experiment.policy
        if wanted is not None and Path(wanted).name != Path(profile.policy.source).name:
            raise UserError(
                f"{experiment.name} is about {wanted}, which profile {profile.name} does not hold "
                f"({profile.policy.source}); use --profile flux"
            )
        self.experiment, self.profile, self.overrides = experiment, profile, overrides or {}
        self._policy = profile.policy.model_copy(update={"source": absolute(profile.policy.source)})
        self._evaluation = profile.evaluation.model_dump(mode="json")
        self._rewards = judges(profile)
        self._prompts = {
            split: absolute(getattr(profile.prompts, split)) for split in PromptSplits.model_fields
        }
        self._evaluations: dict[str, tuple[EvaluationConfig, PolicyConfig]] = {}
        self._presets: dict[tuple[str, str], dict[str, Any]] = {}
        self._first: dict[str, ResolvedCell] = {}

    def resolve(self, key: str, seed: int) -> ResolvedCell:
        """Everything that cell ``key`` at ``seed`` is, see :func:`resolve`."""
        known = self._first.get(key)
        if known is None:
            return self._resolve(key, seed)
        if known.train is None:
            return known
        train = known.train.model_copy(update={"seed": seed})
        return known.model_copy(update={"seed": seed, "train": train})

    def _resolve(self, key: str, seed: int) -> ResolvedCell:
        experiment, profile = self.experiment, self.profile
        if key not in experiment.cells:
            hint = nearest(key, experiment.cells)
            raise UserError(f"{experiment.name} has no cell {key!r}; {hint}")
        cell = experiment.cells[key]
        where = f"{experiment.name}, cell {key}"
        evaluation, policy = self._evaluated(cell, where)
        train = preset = None
        if cell.method is not None:
            preset = cell.preset or experiment.preset
            layers = self._layers(cell, preset, where)
            if any("seed" in layer for layer in layers):
                raise UserError(f"{where}: seed: not a setting of a cell; give --seeds")
            layers = (*layers, self._budget(cell, merge({"seed": seed}, *layers), where))
            train = validate(TrainConfig, merge({"seed": seed}, *layers), where)
        resolved = ResolvedCell(
            key=key,
            seed=None if train is None else seed,
            preset=preset,
            method=cell.method or ("base" if cell.checkpoint is None else "checkpoint"),
            train=train,
            policy=policy,
            evaluation=evaluation,
            evaluation_prompts=self._prompts[evaluation.split],
            profile=profile,
            train_rewards=cell.train,
            checkpoint=_located(cell.checkpoint),
            credit=experiment.credit,
        )
        self._first[key] = resolved
        return resolved

    def _budget(self, cell: CellConfig, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The change to the training configuration ``data`` that keeps it within its budget."""
        if cell.budget is None:
            return {}
        seconds = cell.budget.device_seconds
        if seconds == "profile":
            seconds = self.profile.device_seconds
            if seconds is None:
                raise UserError(
                    f"{where}: budget.device_seconds: profile {self.profile.name} names none; "
                    "add device_seconds to the profile, or a number here"
                )
        own = validate(TrainConfig, data, where)
        if seconds is not None:
            # The budget is to end it, not its iterations, and each of these is to stay what it was.
            limits = {
                "max_device_seconds": seconds,
                "iterations": LENGTHENED * own.optimization.iterations,
            }
            method = own.method.with_resolved_schedule(own.shape).model_dump(mode="json")
            return {"optimization": limits, "method": method}
        assert cell.budget.evaluations_of is not None
        reference = self.resolve(cell.budget.evaluations_of, data["seed"]).train
        assert reference is not None
        wanted = training_counts(reference).rollout_evaluations
        return {"optimization": {"iterations": iterations_within(own, wanted)}}

    def _evaluated(self, cell: CellConfig, where: str) -> tuple[EvaluationConfig, PolicyConfig]:
        """The protocol, and the policy at its resolution and guidance."""
        changes = repr(cell.evaluation)
        if changes in self._evaluations:
            return self._evaluations[changes]
        data = merge(self._evaluation, cell.evaluation)
        evaluation = validate(EvaluationConfig, data, f"{where}: evaluation")
        diversity, rewards = evaluation.diversity, self.profile.rewards
        if diversity is not None and diversity.features not in rewards:
            hint = nearest(diversity.features, rewards)
            raise UserError(
                f"{where}: evaluation.diversity.features: profile {self.profile.name} has no "
                f"reward {diversity.features!r}; {hint}"
            )
        update = {
            "resolution": evaluation.resolution,
            "guidance_scale": evaluation.guidance_scale,
        }
        self._evaluations[changes] = evaluation, self._policy.model_copy(update=update)
        return self._evaluations[changes]

    def _preset(self, method: str, preset: str) -> dict[str, Any]:
        if (method, preset) not in self._presets:
            self._presets[method, preset] = load_preset(method, preset)
        return self._presets[method, preset]

    def _pictures(self, cell: CellConfig, where: str) -> dict[str, Any] | None:
        """The images kept during training: under the protocol that the cell is evaluated with."""
        if not self.profile.preview_prompts:
            return None
        evaluation, _ = self._evaluated(cell, where)
        limit, every = self.profile.preview_prompts, self.profile.preview_every
        return {
            "file": self._prompts[evaluation.split],
            "limit": limit if evaluation.limit is None else min(limit, evaluation.limit),
            "every": every,
            "seed": evaluation.seed,
            "grid": evaluation.grid,
            "resolution": evaluation.resolution,
            "guidance_scale": evaluation.guidance_scale,
        }

    def _layers(self, cell: CellConfig, preset: str, where: str) -> tuple[Mapping[str, Any], ...]:
        """What a training configuration is laid together from; later layers win."""
        profile = self.profile
        assert cell.method is not None
        scaled: dict[str, Any] = {}
        tuned: dict[str, Any] = {}
        rates = profile.learning_rates
        rate = rates.get(cell.learning_rate_key or cell.method)
        if rates and cell.learning_rate_key is not None and rate is None:
            hint = nearest(cell.learning_rate_key, rates)
            raise UserError(
                f"{where}: learning_rate_key: profile {profile.name} has no learning rate of "
                f"{cell.learning_rate_key!r}; {hint}"
            )
        if preset == "matched":
            scaled = {"method": profile.method_settings.get(cell.method, {})}
        if preset == "matched" and rate is not None:
            tuned = {"optimization": {"learning_rate": rate}}
        for name in cell.train:
            if name not in self._rewards:
                hint = nearest(name, profile.rewards)
                raise UserError(f"{where}: profile {profile.name} has no reward {name!r}; {hint}")
        validation = None
        if profile.validation_prompts:
            validation = {
                "file": self._prompts["validation"],
                "limit": profile.validation_prompts,
                "every": profile.validation_every,
            }
        shared = {
            "policy": self._policy,
            "validation": validation,
            "pictures": self._pictures(cell, where),
            "prompts": {"file": self._prompts["train"]},
            "rewards": {name: {"reward": self._rewards[name]} for name in cell.train},
        }
        changes = (
            profile.training,
            self._preset(cell.method, preset),
            scaled,
            tuned,
            profile.budget_overrides if cell.budget_overrides else {},
            cell.set,
            self.overrides,
        )
        changed = {section for change in changes for section in change}
        for name in changed & {"policy", "rewards"}:  # laid over, and validated with the changes
            shared[name] = _plain(shared[name])
        return shared, *changes


def _plain(value: Any) -> Any:
    """Validated models as the mappings that they were made from."""
    if isinstance(value, StrictModel):
        return value.model_dump(mode="json")
    return {name: _plain(one) for name, one in value.items()}


def resolve(
    experiment: Experiment,
    profile: Profile,
    key: str,
    seed: int,
    overrides: Mapping[str, Any] | None = None,
) -> ResolvedCell:
    """Everything that cell ``key`` at ``seed`` is, under ``profile``.

    Later layers win: the profile's shared training settings, the method's preset, the tuned
    learning rate (``matched`` alone), what the profile shortens, the cell's own changes,
    ``overrides``, the cell's budget.

    Raises:
        UserError: no such cell, or an impossible configuration; in one line.
    """
    return Resolver(experiment, profile, overrides).resolve(key, seed)


def judges(profile: Profile) -> dict[str, RewardConfig]:
    """Every reward of the profile, its source found."""
    return {name: reward.config for name, reward in profile.rewards.items()}


def expand(
    experiment: Experiment,
    profile: Profile,
    seeds: Sequence[int],
    overrides: Mapping[str, Any] | None = None,
) -> list[ResolvedCell]:
    """All cells of an experiment: what is not trained once, the others at each seed.

    Raises:
        UserError: a cell or the table is wrong.
    """
    base = [key for key, cell in experiment.cells.items() if cell.method is None]
    trained = [key for key, cell in experiment.cells.items() if cell.method is not None]
    resolver = Resolver(experiment, profile, overrides)
    resolved = [resolver.resolve(key, 0) for key in base]
    for seed in seeds:
        resolved += [resolver.resolve(key, seed) for key in trained]
    experiment.table_spec(profile)
    return resolved
