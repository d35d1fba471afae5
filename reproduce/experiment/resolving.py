"""From a cell, a profile and a seed to all that a run is."""

from collections.abc import Mapping, Sequence
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
from g2rpo.rewards.base import RewardConfig
from g2rpo.training.config import TrainConfig
from g2rpo.training.counts import iterations_within, training_counts
from reproduce.bundled import absolute
from reproduce.experiment.cells import Budget, CellConfig, Experiment
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


class Layer(NamedTuple):
    """Settings, and where they come from. Of several layers the later ones win."""

    origin: str
    settings: Mapping[str, Any]


def laid_together(layers: Sequence[Layer]) -> dict[str, Any]:
    """The settings of all ``layers``."""
    return merge({}, *(layer.settings for layer in layers))


class Resolver:
    """Resolves the cells of one experiment under one profile.

    An experiment may have thousands of cells at many seeds: each cell is validated once.
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
        self._rewards = {name: given(config) for name, config in judges(profile).items()}
        self._prompts = {
            split: absolute(getattr(profile.prompts, split)) for split in PromptSplits.model_fields
        }
        self._presets = {
            (cell.method, preset): load_preset(cell.method, preset)
            for cell in experiment.cells.values()
            if cell.method is not None
            for preset in (cell.preset or experiment.preset,)
        }
        self._resolved: dict[str, ResolvedCell] = {}

    def resolve(self, key: str, seed: int) -> ResolvedCell:
        """Everything that cell ``key`` at ``seed`` is, see :func:`resolve`."""
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
            data = laid_together(self.training_layers(key, seed))
            train = validate(TrainConfig, data, self._where(key))
        shown = {
            "resolution": evaluation.resolution,
            "guidance_scale": evaluation.guidance_scale,
        }
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
            policy=self._policy.model_copy(update=shown),
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
        """What the evaluation protocol of a cell is laid together from."""
        return [
            Layer("profile", given(self.profile.evaluation)),
            Layer("cell", self._cell(key).evaluation),
        ]

    def training_layers(self, key: str, seed: int) -> list[Layer]:
        """What the training configuration of a cell is laid together from."""
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
        if preset == "matched" and rate is not None:
            layers.append(Layer("tuned rate", {"optimization": {"learning_rate": rate}}))
        if cell.budget_overrides:
            layers.append(Layer("profile's budget_overrides", profile.budget_overrides))
        layers += [Layer("cell", cell.set), Layer("-s", self.overrides)]
        if any("seed" in layer.settings for layer in layers):
            raise UserError(f"{where}: seed: not a setting of a cell; give --seeds")
        layers.append(Layer("--seed", {"seed": seed}))
        if cell.budget is not None:
            own = validate(TrainConfig, laid_together(layers), where)
            layers.append(Layer("budget", self._within(cell.budget, own, where)))
        return layers

    def _shared(self, key: str) -> dict[str, Any]:
        """What the profile says of every training, outside its section ``training``."""
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
        if profile.preview_prompts:  # under the protocol that the cell is evaluated with
            evaluation, limit = self._evaluation(key), profile.preview_prompts
            shared["pictures"] = {
                "file": self._prompts[evaluation.split],
                "limit": limit if evaluation.limit is None else min(limit, evaluation.limit),
                "every": profile.preview_every,
                "seed": evaluation.seed,
                "grid": evaluation.grid.model_dump(mode="json"),
                "resolution": evaluation.resolution,
                "guidance_scale": evaluation.guidance_scale,
            }
        return shared

    def _rate(self, cell: CellConfig, where: str) -> float | None:
        """The tuned learning rate of a cell; None where its method was not tuned."""
        rates, key = self.profile.learning_rates, cell.learning_rate_key
        if rates and key is not None and key not in rates:
            raise UserError(
                f"{where}: learning_rate_key: profile {self.profile.name} has no learning rate of "
                f"{key!r}; {nearest(key, rates)}"
            )
        return rates.get(key or str(cell.method))

    def _within(self, budget: Budget, own: TrainConfig, where: str) -> dict[str, Any]:
        """The change to the training ``own`` that keeps it within ``budget``."""
        seconds = budget.device_seconds
        if seconds == "profile":
            seconds = self.profile.device_seconds
            if seconds is None:
                raise UserError(
                    f"{where}: budget.device_seconds: profile {self.profile.name} names none; "
                    "add device_seconds to the profile, or a number here"
                )
        if seconds is not None:
            # The budget is to end it, not its iterations, and each of these is to stay what it was.
            limits = {
                "max_device_seconds": seconds,
                "iterations": LENGTHENED * own.optimization.iterations,
            }
            own_method = own.method.model_dump(mode="json")
            method = own.method.with_resolved_schedule(own.shape).model_dump(mode="json")
            changed = {name: value for name, value in method.items() if value != own_method[name]}
            return {"optimization": limits, "method": changed}
        assert budget.evaluations_of is not None
        reference = self.resolve(budget.evaluations_of, own.seed).train
        assert reference is not None
        wanted = training_counts(reference).rollout_evaluations
        return {"optimization": {"iterations": iterations_within(own, wanted)}}

    def _evaluation(self, key: str) -> EvaluationConfig:
        where, rewards = f"{self._where(key)}: evaluation", self.profile.rewards
        data = laid_together(self.evaluation_layers(key))
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
    """What a file says of ``config``, without the defaults."""
    return config.model_dump(mode="json", exclude_unset=True)


def resolve(
    experiment: Experiment,
    profile: Profile,
    key: str,
    seed: int,
    overrides: Mapping[str, Any] | None = None,
) -> ResolvedCell:
    """Everything that cell ``key`` at ``seed`` is, under ``profile``.

    Later layers win: the profile's shared training settings, the method's preset, the tuned
    learning rate (``matched`` alone), the profile's ``budget_overrides``, the cell's own changes,
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
