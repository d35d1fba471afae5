"""``g2rpo weights``: list, fetch, verify and lock the published weights."""

from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.errors import UserError
from g2rpo.terminal import plain_table, wide_console

if TYPE_CHECKING:
    from g2rpo.hub.catalogue import Artifact
    from g2rpo.hub.fetch import FetchOptions

app = typer.Typer(
    no_args_is_help=True,
    help="List, fetch, verify and lock published weights.",
)

Names = Annotated[
    list[str] | None, typer.Argument(help="Artifacts from `g2rpo weights list`, or owner/name.")
]
ProfileName = Annotated[
    str | None,
    typer.Option("--profile", help="The weights of a profile, e.g. flux or a YAML."),
]
Mirror = Annotated[
    str | None,
    typer.Option(
        "--mirror",
        envvar="G2RPO_MIRROR",
        help="A folder with files as owner/name/file, or the URL of a hub-compatible server.",
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Do not use the network, like HF_HUB_OFFLINE=1.")
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
    """The size of an artifact; ``~`` marks an estimate, ``?`` an unknown size."""
    from rich import filesize

    size, exact = artifact.size()
    if size is None:
        return "?"
    return filesize.decimal(size) if exact else f"~{filesize.decimal(size)}"


@app.command("list")
def list_weights(profile: ProfileName = None) -> None:
    """List published weights with size, licence, and whether they are cached. Works offline."""
    from g2rpo.hub.lock import read_lock
    from g2rpo.hub.status import artifact_state

    lock = read_lock()
    table = plain_table("artifact", "needed by", "size", "licence", "gated", "state", "where")
    for artifact in _select(None, profile):
        state = artifact_state(artifact, lock)
        gated = f"yes: {artifact.page}" if artifact.gated else "no"
        size, licence = readable_size(artifact), artifact.licence or "not stated"
        where = str(state.folder or "")
        table.add_row(artifact.name, artifact.needed_by, size, licence, gated, state.word, where)
    wide_console().print(table)


def fetch_options(mirror: str | None, *, offline: bool, newest: bool = False) -> "FetchOptions":
    """Fetch options that report progress on standard error."""
    from g2rpo.hub.fetch import FetchOptions

    return FetchOptions(mirror, offline, newest, lambda line: typer.echo(line, err=True))


@app.command()
def fetch(
    names: Names = None,
    profile: ProfileName = None,
    mirror: Mirror = None,
    offline: Offline = False,
    newest: Annotated[
        bool, typer.Option("--newest", help="Fetch the newest revision instead of the locked one.")
    ] = False,
) -> None:
    """Fetch and verify weights; complete cached files are not fetched again.

    If interrupted, run the same command to resume.
    """
    from g2rpo.hub.fetch import fetch as fetch_artifact
    from g2rpo.hub.lock import read_lock

    if not names and profile is None:
        raise UserError("nothing to fetch; give names from `g2rpo weights list`, or --profile")
    lock = read_lock()
    options = fetch_options(mirror, offline=offline, newest=newest)
    artifacts = _select(names, profile)
    failed: list[str] = []
    for artifact in artifacts:
        try:
            fetch_artifact(artifact, lock, options)
        except UserError as error:  # the others may still be fetched
            if len(artifacts) == 1:
                raise
            failed.append(artifact.name)
            typer.echo(f"error: {error}", err=True)
        else:
            typer.echo(f"{artifact.name}: ready")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(artifacts)} artifacts were not fetched: {', '.join(failed)}; "
            "fix the errors above and run the same command again"
        )


@app.command()
def verify(names: Names = None, profile: ProfileName = None) -> None:
    """Read all cached files again and compare their hashes. Works offline.

    The exit code is 2 if a file is altered, or a requested file is missing.
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
        bool, typer.Option("--update", help="Overwrite entries of the lock file that differ.")
    ] = False,
) -> None:
    """Lock the revision and SHA-256 of cached files that the catalogue does not pin.

    Later fetches and loads use the locked revision. Files that differ from the lock file are an
    error without --update.
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
            f"{path}: {differing[0]} differs from the locked file ({len(differing)} in total), "
            "nothing was written; run `g2rpo weights fetch`, or add --update"
        )
    if changes:
        write_lock(new, path)
    typer.echo(f"{path}: {len(changes)} changes")
