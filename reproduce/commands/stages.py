"""``g2rpo embed``, ``train``, ``sample`` and ``score``: one stage, or scores of any images."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from reproduce.experiment import ResolvedCell
    from reproduce.experiment.layout import Layout
    from reproduce.stages.base import CellStage


def _cell(
    experiment: str,
    key: str,
    profile: str,
    seed: int,
    results: Path,
    overrides: list[str] | None,
) -> "tuple[Layout, ResolvedCell]":
    """The cell that the arguments of a command name, and where its runs are."""
    settings = parse_overrides(overrides or [])  # before the imports, which take seconds
    from reproduce import experiment as experiments
    from reproduce.jobs.runner import build_assets, check_hardware
    from slurm.cluster import load_cluster

    chosen = experiments.load_profile(profile)
    loaded = experiments.load_experiment(experiment)
    check_hardware(chosen, loaded, load_cluster("local"))
    build_assets(chosen)
    return layout_of(results), experiments.resolve(loaded, chosen, key, seed, settings)


def _perform(stage: "CellStage") -> None:
    """Runs one stage of a cell under its lease, on the launched ranks.

    Raises:
        UserError: the training that it needs is missing; nothing is written then.
    """
    from reproduce.stages.base import perform
    from reproduce.stages.training import Train
    from slurm.distributed import join

    cell = stage.cell
    # Before the lease, whose folder would look like a run.
    if stage.kind != Train.kind and not Train(stage.layout, cell).is_recorded():
        raise UserError(
            f"{cell.key}, seed {cell.seed} is not trained; run `g2rpo train` on this cell first"
        )
    with join(int(os.environ.get("WORLD_SIZE", "1"))) as ranks:
        perform(stage, ranks)


def embed(
    experiment: ExperimentName,
    profile: ProfileName = "mini",
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Training seed; repeatable; default: the profile's."),
    ] = None,
    results: Results = Path("results"),
    overrides: Overrides = None,
) -> None:
    """Encode the prompts of an experiment, so that no other stage needs the text encoders.

    Embeddings are cached in RESULTS/runs/embeddings. If interrupted, run the same command to
    resume.
    """
    from reproduce import experiment as experiments
    from reproduce.jobs.runner import build_assets
    from reproduce.stages import embedding

    chosen = experiments.load_profile(profile)
    loaded = experiments.load_experiment(experiment)
    build_assets(chosen)
    settings = parse_overrides(overrides or [])
    cells = experiments.expand(loaded, chosen, seed or chosen.seeds, settings)
    for folder in embedding.embed(cells, layout_of(results)):
        typer.echo(folder)


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
    from reproduce.stages.training import Train

    stage = Train(*_cell(experiment, cell, profile, seed, results, overrides))
    _perform(stage)
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
    from reproduce.stages.cells import Sample

    stage = Sample(*_cell(experiment, cell, profile, seed, results, overrides))
    _perform(stage)
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
        from reproduce.stages.cells import Sample, Score

        place = _cell(source, cell, profile or "mini", seed, results, overrides)
        _perform(Sample(*place))
        stage = Score(*place)
        _perform(stage)
        stage.finish()  # if killed after the last share was scored
        typer.echo(stage.folder / "scores.parquet")
        return
    from reproduce import experiment as experiments
    from reproduce.jobs.runner import build_assets
    from reproduce.stages import score_folder
    from slurm.local import interrupted_by_term

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
    with interrupted_by_term():
        score_folder.score(request, configs)
