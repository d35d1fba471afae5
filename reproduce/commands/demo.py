"""``g2rpo demo``: the mini world's base and a trained checkpoint, side by side."""

from pathlib import Path
from typing import Annotated

import typer

from g2rpo.errors import UserError
from g2rpo.files import check_place

CHECKPOINT = "benchmarks/mini_world/trained/g2rpo"
"""What ``g2rpo export`` wrote of a G²RPO run on the mini world; its README says which."""


def demo(
    caption: Annotated[
        str, typer.Argument(help="What to draw, in the words of the mini world.")
    ] = "a white cross below a small green star on brown",
    images: Annotated[int, typer.Option(min=1, max=64, help="Images of each model.")] = 6,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The PNG; a PDF is written beside it.")
    ] = Path("demo.png"),
) -> None:
    """Draw a caption with the mini world's base and with G²RPO, score both, save them as a PNG."""
    from benchmarks.mini_world.world import scene_of

    try:
        scene_of(caption)
    except UserError as error:
        raise UserError(f"{error}; try 'a red ring on pink'") from None
    if output.is_dir():
        raise UserError(f"{output}: is a folder; give a file, e.g. {output / 'demo.png'}")
    check_place(output)
    import torch

    from g2rpo.data.prompts import Prompt
    from g2rpo.flow.schedule import build_grid
    from g2rpo.policy import load_policy
    from g2rpo.rewards.registry import load_reward
    from g2rpo.sampling import sample_ode
    from g2rpo.terminal import literal, plain_table, wide_console
    from reproduce.experiment import absolute, load_profile
    from reproduce.experiment.resolving import reward_configs
    from reproduce.tables.picture_grid import picture_grid

    profile = load_profile("mini")
    base = profile.policy.model_copy(update={"source": absolute(profile.policy.source)})
    policy = load_policy(base, "cpu")
    grid = build_grid(profile.evaluation.grid, policy.image_tokens)
    prompts = [Prompt(f"demo-{number}", caption) for number in range(images)]
    typer.echo(f"drawing {images} images with the base and with G²RPO", err=True)
    pictures = {"Base": sample_ode(policy, prompts, grid, profile.evaluation.seed)}
    policy.load_transformer(Path(absolute(CHECKPOINT)))
    pictures["G²RPO"] = sample_ode(policy, prompts, grid, profile.evaluation.seed)

    table = plain_table("reward", *pictures, right=tuple(pictures))
    scores = {}
    for name, config in reward_configs(profile).items():
        model = load_reward(config, "cpu")
        scores[name] = torch.stack(
            [model.score(list(shown), [caption] * images) for shown in pictures.values()]
        )
        means = scores[name].mean(1).tolist()
        table.add_row(literal(profile.label(name)), *[f"{mean:.3f}" for mean in means])
    wide_console().print(table)
    listed = {"HPS": scores["hps"], "attributes": scores["attributes"]}
    rows = [
        f"{caption}: "
        + ", ".join(f"{name} {one[0, n]:.3f} → {one[1, n]:.3f}" for name, one in listed.items())
        for n in range(images)
    ]
    columns = {label: [image.numpy() for image in shown] for label, shown in pictures.items()}
    typer.echo(picture_grid(columns, rows, output))
