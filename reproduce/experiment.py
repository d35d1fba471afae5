"""Experiments and profiles: which cells a table has, and how each is trained and evaluated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import Field

from benchmarks.cells import Key
from benchmarks.protocol import CreditConfig, EvaluationConfig
from g2rpo.config import StrictModel, load_yaml, merge, nearest, validate
from g2rpo.errors import UserError
from g2rpo.policy import CheckpointConfig, PolicyConfig
from g2rpo.rewards.base import RewardConfig
from g2rpo.training.config import TrainConfig
from reproduce.counts import iterations_within, training_counts
from reproduce.render.spec import TableSpec

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
PRESETS = ("released", "matched")


class PromptSplits(StrictModel):
    """The three disjoint prompt files; relative paths are relative to the repository."""

    train: str
    validation: str
    test: str


class Hardware(StrictModel):
    """What a profile needs to run."""

    gpus: int = Field(0, ge=0)
    gpu_memory_gb: int = Field(0, ge=0)
    engine: Literal["replicated", "sharded", "lora"] = "replicated"
    """How the policy is held: whole on every rank, sharded over them, or frozen under LoRA."""
    ranks: int | None = Field(None, ge=1)
    """Processes of a training run; null is one per GPU, one without."""
    evaluation_gpus: int | None = Field(None, ge=0)
    """GPUs of one sampling or scoring job; null is one where training has any."""
    evaluation_shares: int = Field(1, ge=1)
    """Jobs that share the sampling, and the scoring, of one cell's prompts."""

    @property
    def training_ranks(self) -> int:
        """Processes of a training run."""
        return self.ranks or max(1, self.gpus)

    @property
    def evaluation_devices(self) -> int:
        """GPUs of one sampling or scoring job."""
        return min(1, self.gpus) if self.evaluation_gpus is None else self.evaluation_gpus


class Profile(StrictModel):
    """One scale: the policy, the prompts, the judges and what all methods share."""

    name: str
    description: str
    policy: PolicyConfig
    prompts: PromptSplits
    rewards: dict[str, RewardConfig] = Field(min_length=1)
    """Every judge, by its column's name."""
    validation_prompts: int = Field(64, ge=0)
    """Validation prompts scored during training for the learning curves; 0 for none."""
    validation_every: int = Field(10, ge=1)
    pictured_prompts: int = Field(0, ge=0)
    """Held-out prompts of which an image is kept now and then during training; 0 for none."""
    pictured_every: int = Field(50, ge=1)
    training: dict[str, Any] = Field(default_factory=dict)
    """Sections of the training configuration that every method shares under ``matched``."""
    method_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What a method's own settings are at this scale under ``matched``, by method."""
    learning_rates: dict[str, float] = Field(default_factory=dict)
    """Tuned learning rates under ``matched``, by method or variant."""
    shortened: dict[str, Any] = Field(default_factory=dict)
    """What this scale cannot afford of a method's own run; laid over cells that ask for it."""
    device_seconds: float | None = Field(None, gt=0)
    """The budget of a study at equal device-seconds, over all of a training's devices."""
    evaluation: EvaluationConfig
    seeds: tuple[int, ...] = (1,)
    keep_images: int | None = Field(None, ge=0)
    """Held-out images kept after scoring; null keeps all."""
    hardware: Hardware = Hardware()
    build: str | None = None
    """``module:function`` that builds the profile's files, called with the folder ``assets``."""
    assets: str | None = None


class Budget(StrictModel):
    """Where a training ends, if not after its iterations: at a cost. One of the two is given."""

    evaluations_of: Key | None = None
    """A cell of the experiment: as many iterations as its rollouts' velocity evaluations allow."""
    device_seconds: Literal["profile"] | float | None = None
    """After the iteration that reaches so many device-seconds; ``profile`` is the profile's."""

    @pydantic.model_validator(mode="after")
    def _one(self) -> "Budget":
        if (self.evaluations_of is None) == (self.device_seconds is None):
            raise ValueError("budget: give evaluations_of or device_seconds, one of the two")
        return self


class CellConfig(StrictModel):
    """One row of a table: what is trained or loaded, and what it changes of the profile."""

    method: str | None = None
    """The method's name; null is not trained here: the base, or a ``checkpoint``."""
    checkpoint: CheckpointConfig | None = None
    """Weights trained elsewhere, which take the place of the base's transformer."""
    train: tuple[str, ...] = ()
    """The rewards it is trained on, by column name; of a checkpoint, as its authors state them."""
    preset: Literal["released", "matched"] | None = None
    """Overrides the experiment's preset."""
    tuned_as: str | None = None
    """Key into the profile's learning rates; null is the method's name."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes to the training configuration."""
    shortened: bool = False
    """Whether the profile's ``shortened`` is laid over its settings."""
    budget: Budget | None = None
    """Ends the training at a cost."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Changes to the evaluation protocol."""

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "CellConfig":
        if self.checkpoint is not None:
            if self.method is not None or self.set or self.preset or self.tuned_as:
                raise ValueError(
                    "a cell is trained (method) or loaded (checkpoint), not both: with a "
                    "checkpoint leave out method, set, preset and tuned_as"
                )
            return self
        if self.method is None and (self.train or self.set or self.budget):
            raise ValueError("the base (no method) takes neither train nor set nor budget")
        if self.method is not None and not self.train:
            raise ValueError("train is empty: name at least one reward")
        return self


class Experiment(StrictModel):
    """One table or study."""

    name: str
    preset: Literal["released", "matched"] = "matched"
    policy: str | None = None
    """Hub id of the base that its checkpoints belong to; None where any policy will do."""
    cells: dict[Key, CellConfig] = Field(min_length=1)
    credit: CreditConfig | None = None
    """Measures the credit of the cells' rollouts, in place of training and scoring them."""
    table: TableSpec

    @property
    def trains(self) -> bool:
        """Whether any of its cells is trained here."""
        return any(cell.method is not None for cell in self.cells.values())

    @pydantic.model_validator(mode="after")
    def _rows_have_cells(self) -> "Experiment":
        for row in self.table.rows:
            if row.key not in self.cells:
                raise ValueError(f"table.rows names {row.key!r}, which is no cell")
        return self

    @pydantic.model_validator(mode="after")
    def _credit_is_of_methods(self) -> "Experiment":
        if self.credit is not None:
            for key, cell in self.cells.items():
                if cell.method is None:
                    raise ValueError(f"credit is measured of methods, and cells.{key} has none")
        return self

    @pydantic.model_validator(mode="after")
    def _budgets_are_of_cells(self) -> "Experiment":
        for key, cell in self.cells.items():
            wanted = None if cell.budget is None else cell.budget.evaluations_of
            if wanted is None:
                continue
            if wanted not in self.cells:
                hint = nearest(wanted, self.cells)
                raise ValueError(f"cells.{key}.budget.evaluations_of: no cell {wanted!r}; {hint}")
            if self.cells[wanted].method is None or self.cells[wanted].budget is not None:
                raise ValueError(
                    f"cells.{key}.budget.evaluations_of: {wanted!r} must be a cell that is trained "
                    "without a budget of its own"
                )
        return self


@dataclass(frozen=True)
class ResolvedCell:
    """One cell at one seed, ready to run.

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
    """

    key: str
    seed: int | None
    preset: str | None
    method: str
    train: TrainConfig | None
    policy: PolicyConfig
    evaluation: EvaluationConfig
    evaluation_prompts: str
    profile: Profile
    train_rewards: tuple[str, ...] = ()
    checkpoint: CheckpointConfig | None = None

    @property
    def is_base(self) -> bool:
        """Whether its weights are the base's own."""
        return self.train is None and self.checkpoint is None


def _named_file(folder: str, name: str, what: str) -> Path:
    """The YAML of a bundled ``name``, or the file that ``name`` itself is a path of."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = HERE / folder / f"{name}.yaml"
    if not path.exists():
        valid = [found.stem for found in (HERE / folder).glob("*.yaml")]
        raise UserError(f"no {what} {name!r}; {nearest(name, valid)}")
    return path


def load_profile(name: str) -> Profile:
    """A bundled profile by name, or a YAML file.

    A file with a key ``extends`` is laid over the profile that it names.

    Raises:
        UserError: there is no such profile, or it is wrong; in one line.
    """
    return validate(Profile, _profile_data(name, ()), f"profile {name}")


def _profile_data(name: str, below: tuple[str, ...]) -> dict[str, Any]:
    if name in below:
        raise UserError(f"profile {name} extends itself: {' -> '.join((*below, name))}")
    data = load_yaml(_named_file("profiles", name, "profile"))
    extended = data.pop("extends", None)
    if extended is None:
        return data
    return merge(_profile_data(str(extended), (*below, name)), data)


def load_experiment(name: str) -> Experiment:
    """A bundled experiment by name, or a YAML file.

    The in-domain columns of a table's rows are those that its cells train on.
    """
    path = _named_file("experiments", name, "experiment")
    data = load_yaml(path)
    cells, table = data.get("cells"), data.get("table")
    if isinstance(cells, dict) and isinstance(table, dict):
        for row in table.get("rows") or []:
            cell = cells.get(row.get("key")) if isinstance(row, dict) else None
            if isinstance(cell, dict) and "train" in cell:
                row.setdefault("train", cell["train"])
    return validate(Experiment, data, f"experiment {name}")


def load_preset(method: str, preset: str) -> dict[str, Any]:
    """The section of ``reproduce/methods/<method>.yaml`` for ``preset``."""
    data = load_yaml(_named_file("methods", method, "method preset"))
    if preset not in data:
        raise UserError(f"reproduce/methods/{method}.yaml has no section {preset!r}")
    section: dict[str, Any] = data[preset]
    return section


def absolute(path: str) -> str:
    """``path`` where it exists from here, else where it exists in the repository, else itself."""
    if Path(path).exists() or not (ROOT / path).exists():
        return path
    return str(ROOT / path)


Located = TypeVar("Located", RewardConfig, CheckpointConfig | None)


def _located(config: Located) -> Located:
    if config is None or config.source is None:
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
        return replace(known, seed=seed, train=known.train.model_copy(update={"seed": seed}))

    def _resolve(self, key: str, seed: int) -> ResolvedCell:
        experiment, profile = self.experiment, self.profile
        if key not in experiment.cells:
            hint = nearest(key, experiment.cells)
            raise UserError(f"{experiment.name} has no cell {key!r}; {hint}")
        cell = experiment.cells[key]
        where = f"{experiment.name}, cell {key}"
        evaluation, policy = self._evaluated(cell, where)
        train = preset = None
        again = True
        if cell.method is not None:
            preset = cell.preset or experiment.preset
            layers = self._layers(cell, preset, where)
            layers = (*layers, self._budget(cell, merge({"seed": seed}, *layers), where))
            train = validate(TrainConfig, merge({"seed": seed}, *layers), where)
            again = not any("seed" in layer for layer in layers)
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
        )
        if again:
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
        if seconds is not None:
            return {"optimization": {"max_device_seconds": seconds}}
        assert cell.budget.evaluations_of is not None
        reference = self.resolve(cell.budget.evaluations_of, data["seed"]).train
        assert reference is not None
        wanted = training_counts(reference).rollout_evaluations
        own = validate(TrainConfig, data, where)
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
        if not self.profile.pictured_prompts:
            return None
        evaluation, _ = self._evaluated(cell, where)
        limit, every = self.profile.pictured_prompts, self.profile.pictured_every
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
        rate = profile.learning_rates.get(cell.tuned_as or cell.method)
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
            profile.shortened if cell.shortened else {},
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
    return {name: _located(config) for name, config in profile.rewards.items()}


def expand(
    experiment: Experiment,
    profile: Profile,
    seeds: Sequence[int],
    overrides: Mapping[str, Any] | None = None,
) -> list[ResolvedCell]:
    """All cells of an experiment: what is not trained once, the others at each seed."""
    base = [key for key, cell in experiment.cells.items() if cell.method is None]
    trained = [key for key, cell in experiment.cells.items() if cell.method is not None]
    resolver = Resolver(experiment, profile, overrides)
    resolved = [resolver.resolve(key, 0) for key in base]
    for seed in seeds:
        resolved += [resolver.resolve(key, seed) for key in trained]
    return resolved
