"""Profiles: the scale at which an experiment runs, and the hardware it needs."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from benchmarks.evaluation.protocol import EvaluationConfig
from benchmarks.evaluation.results import Name
from g2rpo.config import StrictModel, load_yaml, merge, nearest, validate
from g2rpo.errors import UserError
from g2rpo.methods.presets import preset_names
from g2rpo.policy import PolicyConfig
from g2rpo.rewards.base import RewardConfig
from reproduce.bundled import absolute, named_file
from reproduce.experiment.table import PaperColumn

FolderName = Annotated[Name, StringConstraints(max_length=80)]
"""The name of an experiment or a profile, which becomes the name of a folder."""


def with_preset(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an evaluation, over the bundled protocol that their key ``preset`` names.

    Raises:
        UserError: no such protocol.
    """
    settings = dict(evaluation)
    name = settings.pop("preset", None)
    if name is None:
        return settings
    preset = load_yaml(named_file("protocols", str(name)))
    preset.pop("description")
    if "resolution" in preset:  # also in place of another height and width
        preset |= {"height": None, "width": None}
    return merge({"name": name}, preset, settings)


class PromptSplits(StrictModel):
    """Three disjoint prompt files; relative paths are relative to the repository."""

    train: str
    validation: str
    test: str

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        files: dict[str, str] = {}
        for split, file in self:
            if file in files:
                raise ValueError(
                    f"{split}: the same file as {files[file]}; the splits must be disjoint"
                )
            files[file] = split
        return self


class Hardware(StrictModel):
    """The hardware a profile needs."""

    gpus: int = Field(0, ge=0)
    gpu_memory_gb: int = Field(0, ge=0)
    ranks: int | None = Field(None, ge=1)
    """Processes of a training run; null is one per GPU, or one on a CPU."""
    evaluation_gpus: int | None = Field(None, ge=0)
    """GPUs of one sampling or scoring job; null is one if training uses any."""
    evaluation_shares: int = Field(1, ge=1)
    """Jobs among which the sampling and the scoring of a cell's prompts are split."""

    @property
    def training_ranks(self) -> int:
        """Processes of a training run."""
        return self.ranks or max(1, self.gpus)

    @property
    def evaluation_devices(self) -> int:
        """GPUs of one sampling or scoring job."""
        return min(1, self.gpus) if self.evaluation_gpus is None else self.evaluation_gpus


class ProfileReward(RewardConfig):
    """A reward model of the profile, and how tables show its scores."""

    label: str | None = None
    """Heading of its column; null is its name in the profile."""
    paper: PaperColumn | None = None
    """The paper's column for the same reward, or for the one whose role it takes."""

    @property
    def config(self) -> RewardConfig:
        """The configuration of the reward model, with absolute paths."""
        names = RewardConfig.model_fields.keys() & self.model_fields_set
        fields = {name: getattr(self, name) for name in names}
        if self.source is not None:
            fields["source"] = absolute(self.source)
        if self.question is not None and self.question.questions is not None:
            questions = absolute(self.question.questions)
            fields["question"] = self.question.model_copy(update={"questions": questions})
        return RewardConfig(**fields)


class Profile(StrictModel):
    """One scale: the policy, the prompts, the reward models and what all methods share."""

    name: FolderName
    description: str
    paper_model: bool = False
    """Whether the policy is the paper's, so that its numbers can be shown next to ours."""
    policy: PolicyConfig
    prompts: PromptSplits
    rewards: dict[str, ProfileReward] = Field(min_length=1)
    """The reward models by column name."""
    validation_prompts: int = Field(64, ge=0)
    """Validation prompts scored during training for learning curves; 0 for none."""
    validation_every: int = Field(10, ge=1)
    preview_prompts: int = Field(0, ge=0)
    """Held-out prompts sampled every ``preview_every`` iterations during training; 0 for none."""
    preview_every: int = Field(50, ge=1)
    training: dict[str, Any] = Field(default_factory=dict)
    """Training settings that all methods share under ``matched``."""
    method_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of each method at this scale under ``matched``."""
    learning_rates: dict[str, float] = Field(default_factory=dict)
    """Tuned learning rates under ``matched``, by method or variant."""
    budget_overrides: dict[str, Any] = Field(default_factory=dict)
    """Reductions of a method's released run to this scale, for cells that ask for them."""
    device_seconds: float | None = Field(None, gt=0)
    """Budget of compute-matched studies, in device-seconds over all devices of a run."""
    evaluation: EvaluationConfig
    """The protocol; ``preset: NAME`` takes a bundled one, over which the other keys are laid."""
    truth: str | None = None
    """JSON file with the scores of ground-truth images, which define the headroom in tables; it
    changes no run."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (1,)
    keep_images: int | None = Field(None, ge=0)
    """Number of held-out images kept after scoring; null keeps all."""
    hardware: Hardware = Hardware()
    build: str | None = None
    """``module:function`` that builds the profile's files in the folder ``assets``."""
    assets: str | None = None

    @field_validator("evaluation", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return with_preset(value) if isinstance(value, Mapping) else value

    @field_validator("seeds")
    @classmethod
    def _once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("repeated seed")
        return value

    @model_validator(mode="after")
    def _of_methods(self) -> Self:
        methods = preset_names()
        for key in self.method_settings:
            if key not in methods:
                raise ValueError(f"method_settings: no method {key!r}; {nearest(key, methods)}")
        for key in self.learning_rates:
            if not any(key == name or key.startswith(f"{name}_") for name in methods):
                raise ValueError(
                    f"learning_rates: {key!r} is not METHOD or METHOD_VARIANT; "
                    f"{nearest(key, methods)}"
                )
        return self

    @property
    def engine(self) -> Literal["replicated", "sharded", "lora"]:
        """How training holds the policy: replicated on every rank, sharded, or frozen with LoRA."""
        if self.training.get("lora") is not None:
            return "lora"
        execution = self.training.get("execution") or {}
        return "sharded" if execution.get("sharding") == "fsdp2" else "replicated"

    def label(self, reward: str) -> str:
        """The label of ``reward`` in tables."""
        known = self.rewards.get(reward)
        if known is not None and known.label is not None:
            return known.label
        return (reward[:1].upper() + reward[1:]).replace("_", " ")


def load_profile(name: str) -> Profile:
    """Loads a bundled profile by name, or a YAML file.

    A file with the key ``extends`` is merged over the profile it names.

    Raises:
        UserError: no such profile, or it is invalid.
    """
    return validate(Profile, _profile_data(name, ()), f"profile {name}")


def _profile_data(name: str, below: tuple[str, ...]) -> dict[str, Any]:
    if name in below:
        raise UserError(f"profile {name} extends itself: {' -> '.join((*below, name))}")
    data = load_yaml(named_file("profiles", name))
    extended = data.pop("extends", None)
    if extended is None:
        return data
    return merge(_profile_data(str(extended), (*below, name)), data)
