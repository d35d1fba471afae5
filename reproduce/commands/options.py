"""Options that several commands share."""

from collections.abc import Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.checksums import hashing_up_to
from g2rpo.config import nearest, parse_overrides
from g2rpo.errors import UserError
from reproduce.bundled import bundled_names

if TYPE_CHECKING:
    from reproduce.experiment import ResolvedCell
    from reproduce.experiment.layout import Layout
    from reproduce.jobs.plan import Plan
    from slurm.cluster import Cluster

ExperimentName = Annotated[
    str, typer.Argument(help=f"{', '.join(bundled_names('experiments'))}, or a YAML file.")
]
CellKey = Annotated[str, typer.Argument(help="A cell of the experiment, e.g. hps/g2rpo.")]
Seed = Annotated[int, typer.Option("--seed", help="Training seed.")]
ProfileName = Annotated[
    str,
    typer.Option("--profile", help=f"{', '.join(bundled_names('profiles'))}, or a YAML file."),
]
Results = Annotated[
    Path,
    typer.Option("--results", help="Results folder, which contains runs/ and published tables."),
]
Seeds = Annotated[
    str | None, typer.Option(help="Training seeds, e.g. 1,2,3; default: the profile's.")
]
Cells = Annotated[
    str | None,
    typer.Option("--cells", help="Cells to run, e.g. 'base,hps/*'; default: all."),
]
Publish = Annotated[
    bool, typer.Option(help="Write tables to RESULTS/PROFILE instead of RESULTS/runs.")
]
PublishedCells = Annotated[
    bool, typer.Option("--publish", help="Render the cells in RESULTS/PROFILE, not RESULTS/runs.")
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
    """The layout of the results folder.

    Raises:
        UserError: ``results`` is not a folder.
    """
    from reproduce.experiment.layout import Layout

    if results.exists() and not results.is_dir():
        raise UserError(f"--results {results}: not a folder")
    return Layout(results / "runs", results if publish else results / "runs")


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds of ``1,2,3``.

    Raises:
        UserError: not non-negative integers, or repeated.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise UserError(f"--seeds {text!r}: expected non-negative integers, e.g. 1,2,3")
    seeds = tuple(map(int, parts))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text!r}: repeated seed")
    return seeds


def chosen_cells(cells: "Sequence[ResolvedCell]", patterns: str) -> "list[ResolvedCell]":
    """The cells whose name fits one of the comma-separated ``patterns``.

    Raises:
        UserError: a pattern fits no cell.
    """
    keys, chosen = {cell.key for cell in cells}, set()
    for pattern in map(str.strip, patterns.split(",")):
        fitting = {key for key in keys if fnmatchcase(key, pattern)}
        if not fitting:
            raise UserError(f"--cells {patterns!r}: no cell {pattern!r}; {nearest(pattern, keys)}")
        chosen |= fitting
    return [cell for cell in cells if cell.key in chosen]


def plan_for(
    experiment: str,
    profile: str,
    cluster: str,
    seeds: str | None,
    layout: "Layout",
    overrides: Sequence[str],
    *,
    runnable: bool,
    only: str | None = None,
) -> "tuple[Plan, Cluster]":
    """The plan of an experiment and its cluster, from the arguments of a command.

    ``only``: comma-separated names or patterns of the cells to run. ``runnable``: also check that
    the plan can run on this machine or cluster.

    Raises:
        UserError: something does not exist, is invalid, or cannot run there.
    """
    from reproduce import experiment as experiments
    from reproduce.jobs import runner
    from reproduce.jobs.plan import make_plan
    from slurm.checks.limits import refuse_impossible
    from slurm.cluster import load_cluster

    chosen = experiments.load_profile(profile)
    loaded = experiments.load_experiment(experiment)
    place = load_cluster(cluster, gpus=chosen.hardware.gpus)
    numbers = chosen.seeds if seeds is None else parse_seeds(seeds)
    if runnable:
        runner.check_hardware(chosen, loaded, place)
    runner.build_assets(chosen)
    cells = experiments.expand(loaded, chosen, numbers, parse_overrides(overrides))
    if only is not None:
        cells = chosen_cells(cells, only)
    runner.check_image_sizes(chosen, cells)
    if runnable:
        runner.check_memory(chosen, cells)
    # On a login node, verifying large files is left to the jobs.
    light = not runnable or place.kind == "slurm"
    with hashing_up_to() if light else nullcontext():
        plan = make_plan(loaded, chosen, cells, layout)
    wanted = {stage.kind: stage.resources for stage in plan.todo.stages.values()}
    refuse_impossible(place, wanted, chosen.hardware.evaluation_shares)
    if runnable and plan.todo:
        runner.check_held_out_prompts(chosen, cells)
    return plan, place
