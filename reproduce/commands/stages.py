"""``g2rpo train``, ``sample`` and ``score``: one stage of a cell, or scores of any images."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from g2rpo.config import parse_overrides
from g2rpo.errors import UserError
from reproduce.commands.options import (
    CellKey,
    ExperimentName,
    Overrides,
    ProfileName,
    Results,
    Seed,
    layout_of,
)


def _perform(
    kind: str,
    experiment: str,
    key: str,
    profile: str,
    seed: int,
    results: Path,
    overrides: list[str] | None,
) -> Any:
    """Runs one stage of a cell under its lease, on the launched ranks, and returns it."""
    from reproduce import experiment as experiments
    from reproduce.jobs.runner import build_assets, check_hardware
    from reproduce.stages.base import perform
    from reproduce.stages.run import CELL_STAGES
    from reproduce.stages.training import Train
    from slurm.cluster import load_cluster
    from slurm.distributed import join

    settings = parse_overrides(overrides or [])
    chosen = experiments.load_profile(profile)
    loaded = experiments.load_experiment(experiment)
    check_hardware(chosen, loaded, load_cluster("local"))
    build_assets(chosen)
    cell = experiments.resolve(loaded, chosen, key, seed, settings)
    layout = layout_of(results)
    # Before the lease, whose folder would look like a run.
    if kind != "train" and not Train(layout, cell).is_recorded():
        raise UserError(f"{key}, seed {seed} is not trained; run `g2rpo train` on this cell first")
    stage = CELL_STAGES[kind](layout, cell)
    with join(int(os.environ.get("WORLD_SIZE", "1"))) as ranks:
        perform(stage, ranks)
    return stage


def train(
    experiment: ExperimentName,
    cell: CellKey,
    profile: ProfileName = "mini",
    seed: Seed = 1,
    results: Results = Path("results"),
    overrides: Overrides = None,
) -> None:
    """Train one cell, or resume its training.

    For several ranks, start it with `accelerate launch -m reproduce.cli train ...`.
    """
    stage = _perform("train", experiment, cell, profile, seed, results, overrides)
    typer.echo(stage.folder)


def sample(
    experiment: ExperimentName,
    cell: CellKey,
    profile: ProfileName = "mini",
    seed: Seed = 1,
    results: Results = Path("results"),
    overrides: Overrides = None,
) -> None:
    """Sample the held-out images of one trained cell."""
    stage = _perform("sample", experiment, cell, profile, seed, results, overrides)
    typer.echo(stage.images)


def score(
    source: Annotated[
        str, typer.Argument(help="Image folder, manifest (.csv, .jsonl), or experiment.")
    ],
    cell: Annotated[
        str | None, typer.Argument(help="Cell of the experiment whose images to score.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompt set (.txt, .csv, .json, ...) for a folder's images."),
    ] = None,
    rewards: Annotated[
        str | None, typer.Option(help="Rewards, e.g. hps,clip; default: all of the profile.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Profile; default: mini for a cell, flux for other images.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Output folder; default: SOURCE-scores.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip images that cannot be scored, and list them.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per batch; halved on out-of-memory.")
    ] = None,
    seed: Seed = 1,
    results: Results = Path("results"),
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Reward setting, e.g. -s clip.variant=378; repeatable."),
    ] = None,
) -> None:
    """Score images with reward models: a folder, a manifest, or one cell of an experiment.

    If interrupted, run the same command to resume. For several GPUs, start it with `accelerate
    launch -m reproduce.cli score ...`.
    """
    if cell is not None:
        for name, given in (
            ("--prompts", prompts),
            ("--rewards", rewards),
            ("--output", output),
            ("--skip-bad", skip_bad or None),
            ("--batch-size", batch_size),
        ):
            if given is not None:
                raise UserError(f"{name} applies to a folder or manifest, not to a cell")
        arguments = (source, cell, profile or "mini", seed, results, overrides)
        _perform("sample", *arguments)
        stage = _perform("score", *arguments)
        stage.finish()  # if killed after the last share was scored
        typer.echo(stage.folder / "scores.parquet")
        return
    from reproduce import experiment as experiments
    from reproduce.jobs.runner import build_assets
    from reproduce.stages import score_folder

    chosen = experiments.load_profile(profile or "flux")
    build_assets(chosen)
    names = [name.strip() for name in (rewards or "").split(",") if name.strip()]
    if rewards is not None and not names:
        raise UserError("--rewards is empty; omit it to score with all rewards of the profile")
    settings = parse_overrides(overrides or [])
    configs = score_folder.chosen_rewards(chosen, names, settings, batch_size)
    if not source:  # an unset shell variable
        raise UserError("SOURCE is empty; give a folder of images or a manifest")
    path = Path(source)
    output = output or score_folder.default_output(path)
    request = score_folder.Request(path, prompts, output, skip_bad)
    score_folder.score(request, configs)
