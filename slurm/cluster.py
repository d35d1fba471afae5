"""Cluster profiles: a site's partitions, node sizes, limits and container runtime.

A profile is a YAML file; ``slurm/clusters/`` has commented examples.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from g2rpo.config import StrictModel, load_yaml, nearest, validate
from g2rpo.errors import UserError
from slurm.graph import Needs
from slurm.times import minutes_of

HERE = Path(__file__).resolve().parent
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\r\n]*$")]
"""Text that is safe in one line of a batch script."""
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _one_name(value: str) -> str:
    if any(part.split() != [part] for part in value.split(",")):
        raise ValueError("must not be empty or contain spaces; remove the key for the default")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty; remove the key for the default")
    return value


SiteName = Annotated[OneLine, AfterValidator(_one_name)]
"""A name defined by the site, or several separated by commas."""
Text = Annotated[OneLine, AfterValidator(_not_blank)]
TimeLimit = Annotated[int, BeforeValidator(minutes_of), Field(ge=1, le=365 * 24 * 60)]
"""Whole minutes, or a time in sbatch's formats."""
BUILT_IN = ("auto", "slurm", "local")

_NODES = "every single-node job would take all of them; use exclude, constraint or reservation"
_INSTEAD = {
    "the launcher sets it for each job; remove it": "array comment dependency error input job-name "
    "kill-on-invalid-dep open-mode output",
    "it changes how sbatch answers; remove it": "clusters help parsable quiet test-only usage "
    "version wait",
    "jobs run the launcher's own script in its own folder": "chdir wrap",
    "set gpus_per_node and tasks_per_node; the number of ranks is in a profile's hardware": "nodes "
    "ntasks ntasks-per-node",
    "set gpus_per_node, gpu_flag and gpu_type": "gpus gpus-per-node gpus-per-socket gpus-per-task "
    "ntasks-per-gpu tres-per-task",
    "set memory_gb_per_task": "mem mem-per-gpu",
    "set cpus_per_task": "cpus-per-gpu cpus-per-task",
    "jobs are requeued until done; set max_restarts to limit that": "requeue no-requeue",
    "set mail": "mail-type mail-user",
    "set environment; jobs inherit the submitter's as well": "export export-file",
    "set minutes": "time",
    "set signal_lead_seconds": "signal",
    "set partition and cpu_partition": "partition",
    "set account": "account",
    "set qos": "qos",
    "set constraint": "constraint",
    "set exclusive: true": "exclusive",
    "set container": "container",
    _NODES: "nodefile",
}
REFUSED = {flag: instead for instead, flags in _INSTEAD.items() for flag in flags.split()}
"""sbatch flags that ``extra`` may not set, by long name: what to do instead."""


class Mail(StrictModel):
    """Whom SLURM sends mail to, and when."""

    user: SiteName
    events: Annotated[
        tuple[Literal["BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT", "ALL"], ...],
        Field(min_length=1),
    ] = ("FAIL",)


class Container(StrictModel):
    """The container that jobs run in; repository and results are mounted under their own paths."""

    kind: Literal["none", "apptainer", "pyxis", "podman"] = "none"
    image: Text | None = None
    """A .sif file for apptainer, an image name or .sqsh for pyxis, an image name for podman."""
    mounts: tuple[OneLine, ...] = ()
    """Additional folders, ``path`` or ``path:path-inside``, e.g. the cache of published weights."""
    arguments: tuple[OneLine, ...] = ()
    """Additional arguments of apptainer exec, srun (pyxis) or podman run."""
    python: Text = "python3"
    """The Python interpreter inside the image."""

    @model_validator(mode="after")
    def _has_an_image(self) -> Self:
        if self.kind != "none" and self.image is None:
            raise ValueError(f"image: required by kind: {self.kind}")
        if self.kind == "none" and self.image is not None:
            raise ValueError("image: needs kind: apptainer, pyxis or podman")
        return self


class Minutes(StrictModel):
    """Time limits by kind of stage; a stage that needs longer is requeued and resumes. Little work
    is lost, except in ``credit``, which repeats its current rollout: one rollout must fit."""

    embed: TimeLimit = 120
    train: TimeLimit = 1440
    sample: TimeLimit = 240
    score: TimeLimit = 240
    credit: TimeLimit = 1440
    render: TimeLimit = 30


class Cluster(StrictModel):
    """A place to run: a SLURM cluster or this machine."""

    name: str = "slurm"
    kind: Literal["slurm", "local"] = "slurm"
    """``local``: this machine, one stage at a time per device."""
    partition: SiteName | None = None
    cpu_partition: SiteName | None = None
    """For stages without a GPU; null uses ``partition``."""
    account: SiteName | None = None
    qos: SiteName | None = None
    constraint: Text | None = None
    gpus_per_node: int = Field(8, ge=1)
    tasks_per_node: int = Field(8, ge=1)
    """Ranks per node of a stage without GPUs."""
    gpu_flag: Literal["gpus_per_node", "gres"] = "gpus_per_node"
    """How GPUs are requested: ``--gpus-per-node=N`` or ``--gres=gpu:N``."""
    gpu_type: Annotated[SiteName, StringConstraints(pattern=r"^[^:,=]*$")] | None = None
    """As in ``--gres=gpu:TYPE:N``; null accepts any."""
    cpus_per_task: int = Field(8, ge=1)
    memory_gb_per_task: int | None = Field(None, ge=1, le=16_384)
    """Main memory per rank in GB; null uses the partition's default."""
    minutes: Minutes = Minutes()
    signal_lead_seconds: int = Field(300, ge=1, le=65_535)
    """How long before a time limit SLURM signals; one iteration and one checkpoint must fit."""
    max_restarts: int = Field(100, ge=0)
    """How often a job is requeued at most."""
    array_parallelism: int = Field(64, ge=1)
    """Jobs of one array that may run at the same time."""
    exclusive: bool = False
    mail: Mail | None = None
    setup: tuple[OneLine, ...] = ()
    """Shell lines that run before each job's command, e.g. ``module load``."""
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)
    """Environment variables of jobs. Not for secrets: batch scripts are readable."""
    container: Container = Container()
    extra: dict[str, OneLine | int | bool] = Field(default_factory=dict)
    """Additional sbatch flags by their long name, e.g. ``reservation: course``."""

    @field_validator("kind", mode="before")
    @classmethod
    def _no_debug(cls, kind: object) -> object:
        if kind == "debug":
            raise ValueError("debug was removed; use local with --jobs 1")
        return kind

    @model_validator(mode="after")
    def _extra_does_not_override_the_launcher(self) -> Self:
        if len({name.replace("_", "-") for name in self.extra}) < len(self.extra):
            raise ValueError("extra: the same flag with dashes and with underscores")
        for name, value in self.extra.items():
            if not re.fullmatch("[a-z][a-z0-9_-]+", name):
                raise ValueError(
                    f"extra: {name!r}: use the flag's long name, without leading dashes"
                )
            flag = name.replace("_", "-")
            # Whether the flag exists and its value is valid is for sbatch to say.
            problem = REFUSED.get(flag)
            if problem is None and (value is False or value == ""):
                problem = "remove it, or give it a value"
            if flag == "nodelist" and re.search(r"[,\[/]", str(value)):
                problem = _NODES
            if problem is not None:
                raise ValueError(f"extra: {name} is not allowed: {problem}")
        gres = str(self.extra.get("gres", ""))
        if gres and (self.gpu_flag == "gres" or re.search(r"(^|,)\s*(gres/)?gpu\b", gres)):
            raise ValueError(
                "extra: gres cannot request GPUs or be combined with gpu_flag: gres; "
                "set gpus_per_node, gpu_flag and gpu_type"
            )
        return self

    @model_validator(mode="after")
    def _leaves_time_to_save(self) -> Self:
        minutes = dict(self.minutes)
        lead = self.signal_lead_seconds
        # SLURM may send the signal up to a minute early.
        short = [f"{kind} ({most})" for kind, most in minutes.items() if 60 * most < lead + 60]
        if short:
            raise ValueError(
                f"signal_lead_seconds: {lead} leaves no time to work within these minutes: "
                f"{', '.join(short)}; lower it, or raise those limits"
            )
        return self

    def nodes(self, needs: Needs) -> int:
        """Number of nodes of a stage."""
        return -(-needs.ranks // self._per_node(needs))

    def tasks(self, needs: Needs) -> int:
        """Tasks per node of a stage.

        Raises:
            UserError: its ranks cannot be divided equally among nodes.
        """
        per_node = min(needs.ranks, self._per_node(needs))
        if needs.ranks % per_node:
            raise UserError(
                f"cluster {self.name}: {needs.ranks} ranks do not fill nodes of {per_node}; set "
                f"gpus_per_node or tasks_per_node to a divisor of {needs.ranks}"
            )
        return per_node

    def _per_node(self, needs: Needs) -> int:
        return self.gpus_per_node if needs.gpus else self.tasks_per_node

    def partition_of(self, needs: Needs) -> str | None:
        """The partition of a stage; None for the site's default."""
        return self.partition if needs.gpus else self.cpu_partition or self.partition

    def memory_gb(self, needs: Needs) -> int | None:
        """Main memory per node of a stage in GB; None for the site's default."""
        return needs.memory_gb or (self.memory_gb_per_task or 0) * self.tasks(needs) or None

    def time_limit(self, kind: str) -> int:
        """The time limit of a kind of stage in minutes."""
        minutes: int = getattr(self.minutes, kind)
        return minutes


def has_slurm() -> bool:
    """Whether this machine can submit to a SLURM cluster."""
    return shutil.which("sbatch") is not None


def load_cluster(name: str, *, gpus: int = 0) -> Cluster:
    """Loads a cluster profile.

    Args:
        name: ``slurm``, ``local``, a bundled profile or a YAML file; ``auto`` is the file in
            ``G2RPO_CLUSTER`` if set, else SLURM if sbatch is on the path and the work needs GPUs,
            else this machine.
        gpus: how many GPUs the work needs.

    Raises:
        UserError: unknown or invalid profile.
    """
    configured = os.environ.get("G2RPO_CLUSTER")
    if name == "auto" and configured:
        name = configured
    if name == "auto":
        name = "slurm" if gpus and has_slurm() else "local"
    if name in (*BUILT_IN, "debug"):
        return validate(Cluster, {"name": name, "kind": name}, f"cluster {name}")
    path = Path(name)
    if not name.endswith((".yaml", ".yml")):
        path = HERE / "clusters" / f"{name}.yaml"
        if not path.exists():
            valid = [*BUILT_IN, *(found.stem for found in path.parent.glob("*.yaml"))]
            raise UserError(
                f"unknown cluster {name!r}; {nearest(name, valid)}; or pass the path of a YAML file"
            )
    if not path.exists():
        raise UserError(
            f"{path}: no such file; copy an example from slurm/clusters and adapt it as in "
            "docs/cluster.md"
        )
    data = load_yaml(path)
    if not data:
        raise UserError(f"cluster {name}: the file is empty; it needs at least `kind: slurm`")
    return validate(Cluster, {"name": path.stem} | data, f"cluster {name}")
