"""Resolves a cell under a profile and a seed to a complete run configuration."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from benchmarks.evaluation.protocol import CreditConfig, EvaluationConfig
from benchmarks.evaluation.results import cell_name
from g2rpo.config import StrictModel, merge, nearest, validate
from g2rpo.data.prompts import Prompt, read_prompts
from g2rpo.errors import UserError
from g2rpo.methods.presets import load_preset
from g2rpo.policy import CheckpointConfig, PolicyConfig
from g2rpo.policy.config import ImageConfig
from g2rpo.policy.size import pipeline_of
from g2rpo.rewards.base import RewardConfig
from g2rpo.training.config import TrainConfig
from g2rpo.training.counts import iterations_within, training_counts
from reproduce.bundled import absolute, bundled_names
from reproduce.experiment.cells import Budget, CellConfig, Experiment
from reproduce.experiment.profile import Profile, PromptSplits, load_profile, with_preset
from reproduce.experiment.table import TableSpec


class ResolvedCell(StrictModel):
    """One cell at one seed, ready to run.

    Its JSON leaves out the profile, which all cells of a submission share. Seed, preset and
    training configuration are None if nothing is trained.
    """

    key: str
    """The key of its row."""
    seed: int | None
    preset: str | None
    method: str
    """Name of the method, ``base`` or ``checkpoint``."""
    train: TrainConfig | None
    policy: PolicyConfig
    """The policy to evaluate, at the protocol's size and guidance scale."""
    evaluation: EvaluationConfig
    evaluation_prompts: str
    """The held-out prompt file."""
    profile: Profile = Field(exclude=True, repr=False)
    train_rewards: tuple[str, ...] = ()
    """The known training rewards of the weights, by column name."""
    checkpoint: CheckpointConfig | None = None
    """Weights trained elsewhere, if the cell loads them."""
    credit: CreditConfig | None = None
    """How to measure the credit of its rollouts, if the experiment does."""

    @property
    def name(self) -> str:
        """Its name in file names."""
        return cell_name(self.key, self.seed)

    @property
    def label(self) -> str:
        """Its name for people."""
        return self.key if self.seed is None else f"{self.key}, seed {self.seed}"

    @property
    def is_base(self) -> bool:
        """Whether its weights are the base's."""
        return self.train is None and self.checkpoint is None

    def held_out_prompts(self) -> list[Prompt]:
        """The prompts it is evaluated on."""
        return read_prompts(Path(self.evaluation_prompts), self.evaluation.limit)


LENGTHENED = 2
"""Factor on the iterations of a run with a device-seconds budget: the budget must end it."""


class Layer(NamedTuple):
    """Settings and their origin; later layers win."""

    origin: str
    settings: Mapping[str, Any]


def merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """The merged settings of ``layers``."""
    return merge({}, *(layer.settings for layer in layers))


def _of_last_name(layers: Sequence[Layer]) -> list[Layer]:
    """``layers`` without the settings of a method or an objective that a later one replaces."""
    kept = list(layers)
    for section in ("method", "objective"):
        current = None
        for place, layer in enumerate(layers):
            part = layer.settings.get(section)
            name = part.get("name") if isinstance(part, Mapping) else None
            if name is not None and current not in (None, name):
                for below, (_, settings) in enumerate(kept[:place]):
                    rest = {key: value for key, value in settings.items() if key != section}
                    kept[below] = kept[below]._replace(settings=rest)
            current = name or current
    return kept


class Resolver:
    """Resolves the cells of one experiment under one profile.

    Each cell is validated once, whatever the number of seeds.
    """

    def __init__(
        self,
        experiment: Experiment,
        profile: Profile,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepares what all cells share; ``overrides`` change the training of every cell.

        Raises:
            UserError: the experiment needs another policy than the profile has.
        """
        wanted = experiment.policy
        if wanted is not None and Path(wanted).name != Path(profile.policy.source).name:
            fitting = (
                n for n in bundled_names("profiles") if load_profile(n).policy.source == wanted
            )
            raise UserError(
                f"{experiment.name} needs the policy {wanted}, but profile {profile.name} has "
                f"{profile.policy.source}; use --profile {next(fitting, 'PROFILE')}"
            )
        self.experiment, self.profile, self.overrides = experiment, profile, overrides or {}
        self._policy = profile.policy.model_copy(update={"source": absolute(profile.policy.source)})
        self._rewards = {name: given(config) for name, config in reward_configs(profile).items()}
        self._prompts = {
            split: absolute(getattr(profile.prompts, split)) for split in PromptSplits.model_fields
        }
        pipeline = pipeline_of(self._policy)
        self._presets = {
            (cell.method, preset): load_preset(cell.method, preset, pipeline)
            for cell in experiment.cells.values()
            if cell.method is not None
            for preset in (cell.preset or experiment.preset,)
        }
        self._resolved: dict[str, ResolvedCell] = {}

    def resolve(self, key: str, seed: int) -> ResolvedCell:
        """Cell ``key`` at ``seed``, see :func:`resolve`."""
        known = self._resolved.get(key)
        if known is None:
            known = self._resolved[key] = self._resolve(key, seed)
        if known.train is None or known.seed == seed:
            return known
        train = known.train.model_copy(update={"seed": seed})
        return known.model_copy(update={"seed": seed, "train": train})

    def _resolve(self, key: str, seed: int) -> ResolvedCell:
        cell, evaluation = self._cell(key), self._evaluation(key)
        train = None
        if cell.method is not None:
            data = merged(self.training_layers(key, seed))
            train = validate(TrainConfig, data, self._where(key))
        checkpoint = cell.checkpoint
        if checkpoint is not None:
            source = {"source": absolute(checkpoint.source)}
            checkpoint = checkpoint.model_copy(update=source)
        return ResolvedCell(
            key=key,
            seed=None if train is None else seed,
            preset=None if train is None else cell.preset or self.experiment.preset,
            method=cell.method or ("base" if cell.checkpoint is None else "checkpoint"),
            train=train,
            policy=self._policy.at(evaluation),
            evaluation=evaluation,
            evaluation_prompts=self._prompts[evaluation.split],
            profile=self.profile,
            train_rewards=cell.train,
            checkpoint=checkpoint,
            credit=self.experiment.credit,
        )

    def _cell(self, key: str) -> CellConfig:
        cells = self.experiment.cells
        if key not in cells:
            raise UserError(f"{self.experiment.name} has no cell {key!r}; {nearest(key, cells)}")
        return cells[key]

    def _where(self, key: str) -> str:
        return f"{self.experiment.name}, cell {key}"

    def evaluation_layers(self, key: str) -> list[Layer]:
        """The layers of a cell's evaluation protocol."""
        return [
            Layer("profile", given(self.profile.evaluation)),
            Layer("cell", with_preset(self._cell(key).evaluation)),
        ]

    def training_layers(self, key: str, seed: int) -> list[Layer]:
        """The layers of a cell's training configuration."""
        cell, profile, where = self._cell(key), self.profile, self._where(key)
        assert cell.method is not None
        preset = cell.preset or self.experiment.preset
        layers = [
            Layer("profile", self._shared(key)),
            Layer("profile", profile.training),
            Layer("preset", self._presets[cell.method, preset]),
        ]
        rate = self._rate(cell, where)
        if preset == "matched":
            method = profile.method_settings.get(cell.method, {})
            layers.append(Layer("profile's method_settings", {"method": method}))
        if preset != "released" and rate is not None:
            layers.append(Layer("tuned rate", {"optimization": {"learning_rate": rate}}))
        if cell.budget_overrides:
            layers.append(Layer("profile's budget_overrides", profile.budget_overrides))
        layers += [Layer("cell", cell.set), Layer("-s", self.overrides)]
        if any("seed" in layer.settings for layer in layers):
            raise UserError(f"{where}: seed: not a setting of a cell; use --seeds")
        layers = _of_last_name([*layers, Layer("--seed", {"seed": seed})])
        if cell.budget is not None:
            own = validate(TrainConfig, merged(layers), where)
            layers.append(Layer("budget", self._within(cell.budget, own, where)))
        return layers

    def _shared(self, key: str) -> dict[str, Any]:
        """The profile's settings for every training run, apart from its ``training`` section."""
        cell, profile = self._cell(key), self.profile
        for name in cell.train:
            if name not in self._rewards:
                hint = nearest(name, profile.rewards)
                raise UserError(
                    f"{self._where(key)}: profile {profile.name} has no reward {name!r}; {hint}"
                )
        shared: dict[str, Any] = {
            "policy": given(self._policy),
            "prompts": {"file": self._prompts["train"]},
            "rewards": {name: {"reward": self._rewards[name]} for name in cell.train},
        }
        if profile.validation_prompts:
            shared["validation"] = {
                "file": self._prompts["validation"],
                "limit": profile.validation_prompts,
                "every": profile.validation_every,
            }
        if profile.preview_prompts:  # sampled with the cell's evaluation protocol
            evaluation, limit = self._evaluation(key), profile.preview_prompts
            shared["pictures"] = {
                "file": self._prompts[evaluation.split],
                "limit": limit if evaluation.limit is None else min(limit, evaluation.limit),
                "every": profile.preview_every,
                "seed": evaluation.seed,
                "grid": evaluation.grid.model_dump(mode="json"),
                **evaluation.model_dump(include=set(ImageConfig.model_fields)),
            }
        return shared

    def _rate(self, cell: CellConfig, where: str) -> float | None:
        """The tuned learning rate of a cell; None if its method was not tuned."""
        rates, key = self.profile.learning_rates, cell.learning_rate_key
        if rates and key is not None and key not in rates:
            raise UserError(
                f"{where}: learning_rate_key: profile {self.profile.name} has no learning rate "
                f"{key!r}; {nearest(key, rates)}"
            )
        return rates.get(key or str(cell.method))

    def _within(self, budget: Budget, own: TrainConfig, where: str) -> dict[str, Any]:
        """The change to the training configuration ``own`` that ends it at ``budget``."""
        seconds = budget.device_seconds
        if seconds == "profile":
            seconds = self.profile.device_seconds
            if seconds is None:
                raise UserError(
                    f"{where}: budget.device_seconds: profile {self.profile.name} has no "
                    "device_seconds; add it to the profile, or give a number"
                )
        if seconds is not None:
            # The budget ends the run, not its iterations, which stay the same one by one.
            limits = {
                "max_device_seconds": seconds,
                "iterations": LENGTHENED * own.optimization.iterations,
            }
            own_method = own.method.model_dump(mode="json")
            method = own.method.with_resolved_schedule(own.shape).model_dump(mode="json")
            changed = {name: value for name, value in method.items() if value != own_method[name]}
            return {"optimization": limits, "method": changed}
        assert budget.reference is not None  # the only other kind
        reference = self.resolve(budget.reference, own.seed).train
        assert reference is not None
        whole = budget.cost_of is not None
        cost = attrgetter("equal_cost_evaluations" if whole else "rollout_evaluations")
        most: int = cost(training_counts(reference))
        iterations = iterations_within(own, cost, most)
        change: dict[str, Any] = {"optimization": {"iterations": iterations}}
        if not whole:
            return change
        if own.method.measures(0):  # its cost is only known when it trains
            change["optimization"]["max_equal_cost"] = most
        # As many points of the learning curve as the reference has, however cheap an iteration is.
        factor = iterations / reference.optimization.iterations
        for name, section in (("validation", own.validation), ("pictures", own.pictures)):
            if section is not None:
                change[name] = {"every": max(1, round(factor * section.every))}
        return change

    def _evaluation(self, key: str) -> EvaluationConfig:
        where, rewards = f"{self._where(key)}: evaluation", self.profile.rewards
        data = merged(self.evaluation_layers(key))
        evaluation = validate(EvaluationConfig, data, where)
        diversity = evaluation.diversity
        if diversity is not None and diversity.features not in rewards:
            hint = nearest(diversity.features, rewards)
            raise UserError(
                f"{where}.diversity.features: profile {self.profile.name} has no reward "
                f"{diversity.features!r}; {hint}"
            )
        return evaluation


def given(config: StrictModel) -> dict[str, Any]:
    """The explicitly set values of ``config``, without defaults."""
    return config.model_dump(mode="json", exclude_unset=True)


def resolve(
    experiment: Experiment,
    profile: Profile,
    key: str,
    seed: int,
    overrides: Mapping[str, Any] | None = None,
) -> ResolvedCell:
    """Resolves cell ``key`` at ``seed`` under ``profile``.

    Later layers win: the profile's shared training settings, the method's preset, the tuned
    learning rate (``matched`` only), the profile's ``budget_overrides``, the cell's own changes,
    ``overrides``, the cell's budget.

    Raises:
        UserError: no such cell, or an invalid configuration.
    """
    return Resolver(experiment, profile, overrides).resolve(key, seed)


def reward_configs(profile: Profile) -> dict[str, RewardConfig]:
    """The profile's reward models, with absolute sources."""
    return {name: reward.config for name, reward in profile.rewards.items()}


def expand(
    experiment: Experiment,
    profile: Profile,
    seeds: Sequence[int],
    overrides: Mapping[str, Any] | None = None,
) -> list[ResolvedCell]:
    """All cells of an experiment: trained ones at each seed, the others once.

    Raises:
        UserError: a cell or the table is invalid.
    """
    resolver, cells = Resolver(experiment, profile, overrides), experiment.cells
    resolved = [resolver.resolve(key, 0) for key in cells if cells[key].method is None]
    for seed in seeds:
        resolved += [resolver.resolve(key, seed) for key in cells if cells[key].method is not None]
    _check_protocols(experiment.table_spec(profile), resolved)
    return resolved


def _check_protocols(spec: TableSpec, cells: Sequence[ResolvedCell]) -> None:
    """Refuses before the run what :func:`reproduce.tables.rows.select_rows` would refuse after."""
    groups = {row.key: row.group for row in spec.rows}
    of_group: dict[str, ResolvedCell] = {}
    of_name: dict[str, ResolvedCell] = {}
    for cell in cells:
        group, name = groups[cell.key], cell.evaluation.name
        other = of_group.setdefault(group, cell)
        if other.evaluation != cell.evaluation:
            raise UserError(
                f"experiment {spec.name}: cells.{other.key} and cells.{cell.key} are in the group "
                f"{group!r} but have different `evaluation`s; give them the same, or two groups"
            )
        other = of_name.setdefault(name, cell)
        if other.evaluation != cell.evaluation:
            raise UserError(
                f"experiment {spec.name}: cells.{other.key} and cells.{cell.key} have different "
                f"`evaluation`s that are both named {name!r}; set another evaluation.name"
            )
