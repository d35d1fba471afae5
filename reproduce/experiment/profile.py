"""Profiles: the scale at which an experiment runs, and what it needs."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from benchmarks.evaluation.protocol import EvaluationConfig
from benchmarks.evaluation.results import Name
from g2rpo.config import StrictModel, load_yaml, merge, nearest, validate
from g2rpo.errors import UserError
from g2rpo.methods.base import method_names
from g2rpo.policy import PolicyConfig
from g2rpo.rewards.base import RewardConfig
from reproduce.bundled import absolute, named_file
from reproduce.experiment.table import PaperColumn

FolderName = Annotated[Name, StringConstraints(max_length=80)]
"""The name of an experiment or a profile, which becomes the name of a folder."""


class PromptSplits(StrictModel):
    """The three disjoint prompt files; relative paths are relative to the repository."""

    train: str
    validation: str
    test: str

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        files: dict[str, str] = {}
        for split, file in self:
            if file in files:
                raise ValueError(
                    f"{split}: the same file as {files[file]}; the splits are disjoint"
                )
            files[file] = split
        return self


class Hardware(StrictModel):
    """What a profile needs to run."""

    gpus: int = Field(0, ge=0)
    gpu_memory_gb: int = Field(0, ge=0)
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


class ProfileReward(RewardConfig):
    """A reward model of the profile, and how a table shows its scores."""

    label: str | None = None
    """The heading of its column; null is its name in the profile."""
    paper: PaperColumn | None = None
    """The paper's column for the same reward, or the one whose role it takes."""

    @property
    def config(self) -> RewardConfig:
        """What is loaded; its source found from anywhere."""
        given = RewardConfig.model_fields.keys() & self.model_fields_set
        fields = {name: getattr(self, name) for name in given}
        if self.source is not None:
            fields["source"] = absolute(self.source)
        return RewardConfig(**fields)


class Profile(StrictModel):
    """One scale: the policy, the prompts, the judges and what all methods share."""

    name: FolderName
    description: str
    paper_model: bool = False
    """Whether the policy is the paper's own, so that its figures may stand next to ours."""
    policy: PolicyConfig
    prompts: PromptSplits
    rewards: dict[str, ProfileReward] = Field(min_length=1)
    """Every judge, by its column's name."""
    validation_prompts: int = Field(64, ge=0)
    """Validation prompts scored during training for the learning curves; 0 for none."""
    validation_every: int = Field(10, ge=1)
    preview_prompts: int = Field(0, ge=0)
    """Held-out prompts of which an image is kept now and then during training; 0 for none."""
    preview_every: int = Field(50, ge=1)
    training: dict[str, Any] = Field(default_factory=dict)
    """Sections of the training configuration that every method shares under ``matched``."""
    method_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What a method's own settings are at this scale under ``matched``, by method."""
    learning_rates: dict[str, float] = Field(default_factory=dict)
    """Tuned learning rates under ``matched``, by method or variant."""
    budget_overrides: dict[str, Any] = Field(default_factory=dict)
    """What this scale cannot afford of a method's own run; laid over cells that ask for it."""
    device_seconds: float | None = Field(None, gt=0)
    """The budget of a study at equal device-seconds, over all of a training's devices."""
    evaluation: EvaluationConfig
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (1,)
    keep_images: int | None = Field(None, ge=0)
    """Held-out images kept after scoring; null keeps all."""
    hardware: Hardware = Hardware()
    build: str | None = None
    """``module:function`` that builds the profile's files, called with the folder ``assets``."""
    assets: str | None = None

    @field_validator("seeds")
    @classmethod
    def _once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a seed is there twice")
        return value

    @model_validator(mode="after")
    def _of_methods(self) -> Self:
        methods = method_names()
        for key in self.method_settings:
            if key not in methods:
                raise ValueError(f"method_settings: no method {key!r}; {nearest(key, methods)}")
        for key in self.learning_rates:
            if not any(key == name or key.startswith(f"{name}_") for name in methods):
                raise ValueError(
                    f"learning_rates: {key!r} is neither a method nor METHOD_VARIANT; "
                    f"{nearest(key, methods)}"
                )
        return self

    @property
    def engine(self) -> Literal["replicated", "sharded", "lora"]:
        """How its training holds the policy: on every rank, sharded, or frozen under LoRA."""
        if self.training.get("lora") is not None:
            return "lora"
        execution = self.training.get("execution") or {}
        return "sharded" if execution.get("sharding") == "fsdp2" else "replicated"

    def label(self, reward: str) -> str:
        """What ``reward`` is called in tables."""
        known = self.rewards.get(reward)
        if known is not None and known.label is not None:
            return known.label
        return (reward[:1].upper() + reward[1:]).replace("_", " ")


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
    data = load_yaml(named_file("profiles", name))
    extended = data.pop("extends", None)
    if extended is None:
        return data
    return merge(_profile_data(str(extended), (*below, name)), data)
