"""``g2rpo weights``: list, fetch, verify and lock the published weights."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.errors import UserError

if TYPE_CHECKING:
    from g2rpo.hub.catalogue import Artifact
    from g2rpo.hub.fetch import FetchOptions

app = typer.Typer(
    no_args_is_help=True,
    help="Published weights: what a profile needs, fetching it, knowing that it is whole.",
)

Names = Annotated[
    list[str] | None, typer.Argument(help="Artifacts of `g2rpo weights list`, or owner/name.")
]
ProfileName = Annotated[
    str | None, typer.Option("--profile", help="What this profile needs, e.g. flux or a YAML file.")
]
Mirror = Annotated[
    str | None,
    typer.Option(
        "--mirror",
        envvar="G2RPO_MIRROR",
        help="A folder laid out owner/name/file, or the address of a hub-compatible server.",
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Never use the network (as HF_HUB_OFFLINE=1).")
]


def _select(
    names: list[str] | None, profile: str | None, *, prompt_lists: bool = False
) -> tuple["Artifact", ...]:
    from g2rpo.hub.catalogue import WEIGHTS, catalogue
    from reproduce.experiment import load_profile
    from reproduce.experiment.weights import needed_weights

    if names and profile:
        raise UserError("give names or --profile, not both")
    if profile is None:
        return catalogue().select(names or [], (*WEIGHTS, *(["prompts"] if prompt_lists else [])))
    needed = needed_weights(load_profile(profile))
    if not needed:
        typer.echo(f"profile {profile} needs no published weights", err=True)
    return needed


def readable_size(artifact: "Artifact") -> str:
    """The size of an artifact for people; ``~`` where it is not exact."""
    from rich import filesize

    size, exact = artifact.size()
    if size is None:
        return "?"
    return filesize.decimal(size) if exact else f"~{filesize.decimal(size)}"


def print_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """A table on standard output; nothing is cut where it is not a terminal."""
    from g2rpo.terminal import plain_table, wide_console

    table = plain_table(*columns)
    for row in rows:
        table.add_row(*row)
    wide_console().print(table)


@app.command("list")
def list_weights(profile: ProfileName = None) -> None:
    """Show what is published, who needs it, its licence, and whether it is cached. No network."""
    from g2rpo.hub.lock import read_lock
    from g2rpo.hub.status import artifact_state

    lock = read_lock()
    rows = []
    for artifact in _select(None, profile):
        state = artifact_state(artifact, lock)
        gated = f"yes: {artifact.page}" if artifact.gated else "no"
        size, licence = readable_size(artifact), artifact.licence or "not stated"
        where = str(state.folder or "")
        rows.append((artifact.name, artifact.needed_by, size, licence, gated, state.word, where))
    print_table(("artifact", "needed by", "size", "licence", "gated", "state", "where"), rows)


def fetch_options(mirror: str | None, *, offline: bool, newest: bool = False) -> "FetchOptions":
    """Options of fetching that tell on standard error what is done."""
    from g2rpo.hub.fetch import FetchOptions

    return FetchOptions(mirror, offline, newest, lambda line: typer.echo(line, err=True))


@app.command()
def fetch(
    names: Names = None,
    profile: ProfileName = None,
    mirror: Mirror = None,
    offline: Offline = False,
    newest: Annotated[
        bool, typer.Option("--newest", help="Ask for the newest revision instead of the locked.")
    ] = False,
) -> None:
    """Fetch weights and check them; what is cached whole is not fetched again.

    Interrupted at any point, the same command fetches what is not there yet.
    """
    from g2rpo.hub.fetch import fetch as fetch_artifact
    from g2rpo.hub.lock import read_lock

    if not names and profile is None:
        raise UserError("name what to fetch, or give --profile (`g2rpo weights list` shows both)")
    lock = read_lock()
    options = fetch_options(mirror, offline=offline, newest=newest)
    artifacts = _select(names, profile)
    failed: list[str] = []
    for artifact in artifacts:
        try:
            fetch_artifact(artifact, lock, options)
        except UserError as error:  # a gated one must not keep the others away
            if len(artifacts) == 1:
                raise
            failed.append(artifact.name)
            typer.echo(f"error: {error}", err=True)
        else:
            typer.echo(f"{artifact.name}: ready")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(artifacts)} artifacts were not fetched: {', '.join(failed)}; "
            "the reasons are above; run the same command again once they are solved"
        )


@app.command()
def verify(names: Names = None, profile: ProfileName = None) -> None:
    """Read all cached files again and compare their hashes. No network.

    Exit code 2 where a file is altered, or missing among those asked for.
    """
    from g2rpo.hub.lock import read_lock
    from g2rpo.hub.status import file_state

    lock = read_lock()
    wrong: list[str] = []
    everything = not names and profile is None
    for artifact in _select(names, profile, prompt_lists=True):
        states = [file_state(artifact, file, lock, rehash=True) for file in artifact.files]
        if everything and all(state.word == "missing" for state in states):
            continue
        for file, state in zip(artifact.files, states, strict=True):
            typer.echo(f"{artifact.name}  {file.path}  {state.detail or state.word}")
            if state.word in ("missing", "altered") and artifact.name not in wrong:
                wrong.append(artifact.name)
    if wrong:
        raise UserError(
            f"missing or altered files in {', '.join(wrong)}; run `g2rpo weights fetch "
            f"{' '.join(wrong)}` to fix them"
        )


@app.command()
def lock(
    names: Names = None,
    profile: ProfileName = None,
    update: Annotated[
        bool, typer.Option("--update", help="Take over what differs from the lock file.")
    ] = False,
) -> None:
    """Record revision and SHA-256 of what is cached, where the catalogue states none.

    From then on the same revision is fetched and loaded. What differs from the lock file is told
    and refused without --update.
    """
    from g2rpo.hub.lock import lock_path, read_lock, write_lock
    from g2rpo.hub.status import lock_cached

    path = lock_path()
    artifacts = _select(names, profile, prompt_lists=True)
    before = read_lock(path)
    new = lock_cached(artifacts, before, update=update)
    changes = before.changes(new)
    for what, old, now in changes:
        typer.echo(f"{what}: {f'{old[:12]}… -> ' if old else ''}{str(now)[:12]}…")
    differing = [what for what, old, _ in changes if old is not None]
    if differing and not update:
        raise UserError(
            f"{path}: {differing[0]} differs from what is locked ({len(differing)} in all), "
            "nothing was written; fetch what is locked with `g2rpo weights fetch`, or add --update"
        )
    if changes:
        write_lock(new, path)
    typer.echo(f"{path}: {len(changes)} changes")
