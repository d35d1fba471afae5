"""Command-line options that several verbs share, and what they stand for."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.checksums import hashing_up_to
from g2rpo.config import parse_overrides
from g2rpo.errors import UserError
from g2rpo.yaml_text import parse_yaml

if TYPE_CHECKING:
    from reproduce.experiment.layout import Layout
    from reproduce.jobs.plan import Plan
    from slurm.cluster import Cluster

ExperimentName = Annotated[
    str, typer.Argument(help="table1, table2, table3, or the path of an experiment's YAML.")
]
CellKey = Annotated[str, typer.Argument(help="A cell of the experiment, e.g. hps/g2rpo.")]
Seed = Annotated[int, typer.Option("--seed", help="Training seed.")]
ProfileName = Annotated[str, typer.Option("--profile", help="smoke, mini, flux, or a YAML file.")]
Results = Annotated[
    Path,
    typer.Option("--results", help="Folder for runs/ and, with --publish, for the tables."),
]
Seeds = Annotated[
    str | None, typer.Option(help="Training seeds, e.g. 1,2,3; default: the profile's.")
]
Publish = Annotated[
    bool, typer.Option(help="Write tables to results/PROFILE instead of results/runs.")
]
PublishedCells = Annotated[
    bool, typer.Option("--publish", help="Render the cells in results/PROFILE, not results/runs.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", help="Training setting, e.g. -s optimization.iterations=10; repeatable."
    ),
]
ClusterName = Annotated[
    str,
    typer.Option(
        "--cluster",
        help="auto, slurm, local, a bundled cluster profile, or a YAML file.",
    ),
]


def layout_of(results: Path, *, publish: bool = False) -> "Layout":
    """Where things go below ``results``.

    Raises:
        UserError: it is no folder.
    """
    from reproduce.experiment.layout import Layout

    if results.exists() and not results.is_dir():
        raise UserError(f"--results {results}: is no folder")
    return Layout(results / "runs", results if publish else results / "runs")


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds of ``1,2,3``.

    Raises:
        UserError: they are not integers, or one is there twice.
    """
    try:
        seeds = tuple(parse_yaml(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or any(type(seed) is not int for seed in seeds):
        raise UserError(f"--seeds {text!r}: expected integers, e.g. 1,2,3")
    if min(seeds) < 0:
        raise UserError(f"--seeds {text!r}: a seed is 0 or more")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds {text!r}: a seed is there twice")
    return seeds


@dataclass(frozen=True)
class Request:
    """What a user asks to be run.

    Attributes:
        experiment: name or path of the experiment.
        profile: name or path of the profile.
        cluster: name or path of the cluster profile.
        seeds: as on the command line; None for the profile's.
        results: folder of results.
        publish: whether tables go beside the committed ones.
        overrides: changes to the training configuration.
    """

    experiment: str
    profile: str
    cluster: str = "auto"
    seeds: str | None = None
    results: Path = Path("results")
    publish: bool = False
    overrides: Sequence[str] = ()

    def plan(self, *, runnable: bool) -> "tuple[Plan, Cluster]":
        """The plan and the place, checked where it is to be run.

        Raises:
            UserError: what is asked for does not exist, is impossible, or cannot run there.
        """
        from reproduce import experiment as experiments
        from reproduce.jobs import runner
        from reproduce.jobs.plan import make_plan
        from slurm.checks.limits import refuse_impossible
        from slurm.cluster import load_cluster

        profile = experiments.load_profile(self.profile)
        loaded = experiments.load_experiment(self.experiment)
        cluster = load_cluster(self.cluster, gpus=profile.hardware.gpus)
        seeds = profile.seeds if self.seeds is None else parse_seeds(self.seeds)
        if runnable:
            runner.check_hardware(profile, loaded, cluster)
        runner.build_assets(profile)
        settings = parse_overrides(self.overrides)
        cells = experiments.expand(loaded, profile, seeds, settings)
        if runnable:
            runner.check_memory(profile, cells)
        layout = layout_of(self.results, publish=self.publish)
        # Whoever only looks, or submits from a login node, leaves large files to the jobs.
        looks = not runnable or cluster.kind == "slurm"
        with hashing_up_to() if looks else nullcontext():
            plan = make_plan(loaded, profile, cells, layout)
        wanted = {stage.kind: stage.resources for stage in plan.todo.stages.values()}
        refuse_impossible(cluster, wanted, profile.hardware.evaluation_shares)
        return plan, cluster
