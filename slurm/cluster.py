"""Cluster profiles: what a site calls its partitions and how large its nodes are.

A profile is a YAML file; the bundled ones in ``slurm/clusters/`` are commented examples.
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
from slurm.flags import refusal
from slurm.graph import Needs
from slurm.times import minutes_of

HERE = Path(__file__).resolve().parent
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\r\n]*$")]
"""Text that may stand in a line of a batch script."""
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _one_name(value: str) -> str:
    if any(part.split() != [part] for part in value.split(",")):
        raise ValueError("must not be empty or hold spaces; leave the key out for the default")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty; leave the key out for the default")
    return value


SiteName = Annotated[OneLine, AfterValidator(_one_name)]
"""A name that the site has given, or several with commas between them."""
Text = Annotated[OneLine, AfterValidator(_not_blank)]
TimeLimit = Annotated[int, BeforeValidator(minutes_of), Field(ge=1, le=365 * 24 * 60)]
"""Whole minutes, or a time as sbatch has it."""
BUILT_IN = ("auto", "slurm", "local")


class Mail(StrictModel):
    """Whom SLURM writes to, and when."""

    user: SiteName
    events: Annotated[
        tuple[Literal["BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT", "ALL"], ...],
        Field(min_length=1),
    ] = ("FAIL",)


class Container(StrictModel):
    """The container that jobs run in; the repository and the results are mounted as they are."""

    kind: Literal["none", "apptainer", "pyxis", "podman"] = "none"
    image: Text | None = None
    """A .sif file for apptainer, an image name or .sqsh for pyxis, an image name for podman."""
    mounts: tuple[OneLine, ...] = ()
    """Further folders, ``path`` or ``path:path-inside``, e.g. the cache of published weights."""
    arguments: tuple[OneLine, ...] = ()
    """Further arguments of apptainer exec, srun (pyxis) or podman run."""
    python: Text = "python3"
    """The interpreter inside of the image."""

    @model_validator(mode="after")
    def _has_an_image(self) -> Self:
        if self.kind != "none" and self.image is None:
            raise ValueError(f"image: name the image that {self.kind} is to run")
        if self.kind == "none" and self.image is not None:
            raise ValueError("an image needs a kind: apptainer, pyxis or podman")
        return self


class Minutes(StrictModel):
    """Time limits by kind of stage; one that needs longer is requeued and goes on. What is lost
    then is little, but for ``credit``: the rollout that was being measured, so one must fit."""

    embed: TimeLimit = 120
    train: TimeLimit = 1440
    sample: TimeLimit = 240
    score: TimeLimit = 240
    credit: TimeLimit = 1440
    render: TimeLimit = 30


class Cluster(StrictModel):
    """One place to run."""

    name: str = "slurm"
    kind: Literal["slurm", "local"] = "slurm"
    """``local``: this machine, as many stages at once as it has devices."""
    partition: SiteName | None = None
    cpu_partition: SiteName | None = None
    """For stages without a GPU; null is the same."""
    account: SiteName | None = None
    qos: SiteName | None = None
    constraint: Text | None = None
    gpus_per_node: int = Field(8, ge=1)
    tasks_per_node: int = Field(8, ge=1)
    """Ranks on a node of a stage without GPUs."""
    gpu_flag: Literal["gpus_per_node", "gres"] = "gpus_per_node"
    """How GPUs are asked for: ``--gpus-per-node=N`` or ``--gres=gpu:N``."""
    gpu_type: Annotated[SiteName, StringConstraints(pattern=r"^[^:,=]*$")] | None = None
    """As in ``--gres=gpu:TYPE:N``; null takes any."""
    cpus_per_task: int = Field(8, ge=1)
    memory_gb_per_task: int | None = Field(None, ge=1, le=16_384)
    """Main memory for each rank in GB; null takes the partition's default."""
    minutes: Minutes = Minutes()
    signal_lead_seconds: int = Field(300, ge=1, le=65_535)
    """SLURM signals so long before a time limit; a checkpoint and one iteration must fit in."""
    max_restarts: int = Field(100, ge=0)
    """A job that was requeued so often is not requeued by itself any more."""
    array_parallelism: int = Field(64, ge=1)
    """Jobs of one array that run at once."""
    exclusive: bool = False
    mail: Mail | None = None
    setup: tuple[OneLine, ...] = ()
    """Shell lines before each job's command, e.g. ``module load``."""
    environment: dict[VariableName, OneLine] = Field(default_factory=dict)
    """Environment variables of jobs. Not for secrets: batch scripts are readable."""
    container: Container = Container()
    extra: dict[str, OneLine | int | bool] = Field(default_factory=dict)
    """Further sbatch flags by their long name, e.g. ``reservation: course``."""

    @field_validator("kind", mode="before")
    @classmethod
    def _no_debug(cls, kind: object) -> object:
        if kind == "debug":
            raise ValueError("debug is gone: local with --jobs 1 runs in this process")
        return kind

    @model_validator(mode="after")
    def _extra_leaves_the_launcher_s_flags_alone(self) -> Self:
        names = {name.replace("_", "-") for name in self.extra}
        if len(names) < len(self.extra):
            raise ValueError("extra: a flag is there twice, with dashes and with underscores")
        for name, value in self.extra.items():
            if not re.fullmatch("[a-z][a-z0-9_-]+", name):
                raise ValueError(
                    f"extra: {name!r}: write a flag's long name without the dashes in front"
                )
            problem = refusal(name.replace("_", "-"), value)
            if problem is not None:
                raise ValueError(f"extra: {name} cannot be set here: {problem}")
        if "mem-per-cpu" in names and self.memory_gb_per_task is not None:
            raise ValueError(
                "extra: mem-per-cpu cannot be set beside memory_gb_per_task: leave one of them out"
            )
        gres = str(self.extra.get("gres", ""))
        if gres and (self.gpu_flag == "gres" or re.search(r"(^|,)\s*(gres/)?gpu\b", gres)):
            raise ValueError(
                "extra: gres cannot ask for GPUs, nor stand beside gpu_flag: gres: the launcher "
                "asks for GPUs by gpus_per_node, gpu_flag and gpu_type"
            )
        if "oversubscribe" in names and self.exclusive:
            raise ValueError("extra: oversubscribe contradicts exclusive: true")
        return self

    @model_validator(mode="after")
    def _time_to_work_and_to_save(self) -> Self:
        minutes = dict(self.minutes)
        lead = self.signal_lead_seconds
        # SLURM may send the signal a minute too early.
        short = [f"{kind} ({most})" for kind, most in minutes.items() if 60 * most < lead + 60]
        if short:
            raise ValueError(
                f"signal_lead_seconds: {lead} leaves no time to work within minutes of "
                f"{', '.join(short)}: lower it, or raise those limits"
            )
        least = self.extra.get("time-min", self.extra.get("time_min"))
        if least is not None:
            try:
                found = int(minutes_of(least))
            except ValueError as error:
                raise ValueError(f"extra: time-min: {error}") from None
            if not lead + 60 <= 60 * found <= 60 * min(minutes.values()):
                raise ValueError(
                    "extra: time-min must be longer than signal_lead_seconds and no longer than "
                    "any limit in minutes"
                )
        return self

    def nodes(self, needs: Needs) -> int:
        """Nodes that a stage takes."""
        return -(-needs.ranks // self._per_node(needs))

    def tasks(self, needs: Needs) -> int:
        """Tasks on each of its nodes.

        Raises:
            UserError: its ranks cannot be shared equally among nodes.
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
        """The partition of a stage; None is the site's default."""
        return self.partition if needs.gpus else self.cpu_partition or self.partition

    def memory_gb(self, needs: Needs) -> int | None:
        """Main memory on each of a stage's nodes; None where the site's default applies."""
        return needs.memory_gb or (self.memory_gb_per_task or 0) * self.tasks(needs) or None

    def time_limit(self, kind: str) -> int:
        """The time limit of a kind of stage in minutes."""
        found: int = getattr(self.minutes, kind)
        return found


def has_slurm() -> bool:
    """Whether this machine submits to a SLURM cluster."""
    return shutil.which("sbatch") is not None


def load_cluster(name: str, *, gpus: int = 0) -> Cluster:
    """The cluster that ``name`` stands for.

    Args:
        name: ``slurm``, ``local``, a bundled profile or a YAML file; ``auto`` is the file in
            ``G2RPO_CLUSTER`` where that is set, else SLURM where it is found and the work needs
            GPUs, else this machine.
        gpus: how many GPUs the work needs.

    Raises:
        UserError: there is no such profile, or it is wrong; in one line.
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
            raise UserError(f"no cluster {name!r}; {nearest(name, valid)}, or the path of a YAML")
    data = load_yaml(path)
    if not data:
        raise UserError(f"cluster {name}: the file is empty; a single line, kind: slurm, is enough")
    return validate(Cluster, {"name": path.stem} | data, f"cluster {name}")
