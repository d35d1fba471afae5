"""``g2rpo serve-reward``: a reward model of the suite over HTTP."""

import socket
from typing import Annotated

import typer

from g2rpo.errors import UserError, reason
from reproduce.commands.options import ProfileName


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
