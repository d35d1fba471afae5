"""``g2rpo export-images``, ``import-scores`` and ``serve-reward``: exchange with other programs."""

import socket
from pathlib import Path
from typing import Annotated, Literal

import typer

from g2rpo.errors import UserError, reason
from g2rpo.text import visible
from reproduce.commands.options import ProfileName

SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out what cannot be used, and list it.")
]


def export_images(
    source: Annotated[Path, typer.Argument(help="Image folder, or a cell's evaluation folder.")],
    prompts: Annotated[Path, typer.Option(help="Prompt set, data/prompts/geneval.jsonl.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder; must not exist.")],
    layout: Annotated[
        Literal["geneval"], typer.Option(help="The evaluator that reads them.")
    ] = "geneval",
    skip_bad: SkipBad = False,
) -> None:
    """Lay images out for an external evaluator: linked or copied, not altered."""
    from benchmarks.evaluation.scoring import geneval
    from benchmarks.evaluation.scoring.items import read_source, refuse_bad
    from g2rpo.data.prompts import read_prompt_set
    from g2rpo.files import check_place

    del layout  # the only one
    if output.exists():
        raise UserError(f"{output}: already exists; choose another --output")
    check_place(output)
    lines = geneval.read_metadata(prompts)
    known = read_prompt_set(prompts).prompts
    source_items = geneval.without_misread(read_source(source, known))
    refuse_bad(source_items, skip_bad, "exported")
    ids = (prompt.id for prompt in known)
    geneval.export(source_items.items, dict(zip(ids, enumerate(lines), strict=True)), output)
    for name, problem in source_items.bad:
        typer.echo(visible(f"skipped {name}: {problem}"))
    count = len({item.prompt_id for item in source_items.items})
    typer.echo(visible(f"{output}: {len(source_items.items)} images of {count} prompts"))


def import_scores(
    file: Annotated[Path, typer.Argument(help="Scores, e.g. results.jsonl (.csv, .jsonl, ...).")],
    images: Annotated[Path, typer.Option(help="The images, as `g2rpo score` takes them.")],
    reward: Annotated[str, typer.Option(help="What to call the scores.")],
    version: Annotated[str, typer.Option("--version", help="Version of the external scorer.")],
    prompts: Annotated[Path | None, typer.Option(help="Prompt set for a folder's images.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of scores; default: IMAGES-scores.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of the scores; default: score or correct.")
    ] = None,
    skip_bad: SkipBad = False,
) -> None:
    """Add scores of an external scorer to those of `g2rpo score`."""
    from reproduce.stages.import_scores import Outside, import_scores
    from reproduce.stages.score_folder import Request, default_output

    for option, text in (("--reward", reward), ("--version", version)):
        if not text.strip():
            raise UserError(f"{option} is empty")
    request = Request(images, prompts, output or default_output(images), skip_bad)
    import_scores(Outside(file, reward, version, column), request)


def serve_reward(
    name: Annotated[str, typer.Argument(help="A reward of the profile, e.g. hps.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    profile: ProfileName = "flux",
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with a key that clients must send.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Reward setting, e.g. -s batch_size=64; repeatable."),
    ] = None,
) -> None:
    """Serve a reward model over HTTP, for rewards with `model: http`."""
    try:
        import uvicorn

        from reproduce.serving import reward_app
    except ModuleNotFoundError as error:
        raise UserError(f"no package {error.name}; run `pip install 'g2rpo[serve]'`") from None
    from g2rpo.config import parse_overrides
    from g2rpo.rewards.registry import load_reward
    from g2rpo.rewards.server import read_key
    from reproduce.experiment import load_profile
    from reproduce.jobs.runner import build_assets
    from reproduce.stages.sampling import device
    from reproduce.stages.score_folder import chosen_rewards

    key = read_key(api_key_env, "--api-key-env")
    chosen, settings = load_profile(profile), parse_overrides(overrides or [])
    config = chosen_rewards(chosen, [name], {name: settings} if settings else {})[name]
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {reason(error)}; choose others") from None
    with listening:
        build_assets(chosen)
        app = reward_app(load_reward(config, device()), key)
        typer.echo(f"serving {name} at http://{host}:{listening.getsockname()[1]}")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
