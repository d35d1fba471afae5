"""``g2rpo prompts``: list, fetch and check prompt sets."""

from pathlib import Path
from typing import Annotated

import typer

from g2rpo.config import nearest
from g2rpo.errors import UserError
from g2rpo.text import visible
from reproduce.commands.weights import (
    Mirror,
    Offline,
    fetch_options,
    print_table,
    readable_size,
)

app = typer.Typer(
    no_args_is_help=True, help="Prompt sets: fetching the published ones, checking your own."
)
EXAMPLES = 10


@app.command("list")
def list_prompts() -> None:
    """Show the published prompt lists and whether they are cached. No network."""
    from g2rpo.hub.lock import read_lock
    from g2rpo.hub.prompt_sets import SETS, artifact_named
    from g2rpo.hub.status import artifact_state

    lock = read_lock()
    rows = []
    for set_name, names in SETS.items():
        for artifact in map(artifact_named, names):
            state = artifact_state(artifact, lock)
            rows.append(
                (
                    set_name,
                    artifact.name,
                    str(artifact.prompts or "?"),
                    readable_size(artifact),
                    artifact.licence or "not stated",
                    artifact.page,
                    state.word,
                )
            )
    print_table(("set", "list", "prompts", "size", "licence", "page", "state"), rows)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="hpdv2, hpsv2-benchmark; default: hpdv2.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the files; the profile flux reads this one.")
    ] = Path("data/hpdv2"),
    mirror: Mirror = None,
    offline: Offline = False,
) -> None:
    """Fetch published prompt lists, check them, and write them as the profile flux reads them.

    400 validation prompts are held out of the training list, the same ones every time.
    """
    from g2rpo.hub.lock import read_lock
    from g2rpo.hub.prompt_sets import fetch_benchmark, fetch_hpdv2

    writers = {"hpdv2": fetch_hpdv2, "hpsv2-benchmark": fetch_benchmark}
    chosen = names or ["hpdv2"]
    for name in chosen:
        if name not in writers:
            raise UserError(f"unknown prompt set {name!r}; {nearest(name, writers)}")
    lock, options = read_lock(), fetch_options(mirror, offline=offline)
    for name in chosen:
        for path in writers[name](output, lock, options):
            _describe(path)


def _describe(path: Path) -> None:
    from g2rpo.data.overlap import summarise

    found = summarise(path)
    typer.echo(
        visible(
            f"{path}: {found.prompts} prompt{'s' * (found.prompts != 1)} "
            f"({found.distinct} distinct), {found.words} words, "
            f"{found.bytes} bytes, SHA-256 {found.sha256}"
        )
    )


@app.command()
def check(
    train: Annotated[Path, typer.Argument(help="Training prompts (.txt, .csv, .json, ...).")],
    test: Annotated[Path, typer.Argument(help="Prompts that are held out.")],
) -> None:
    """Count two sets, and show which prompts of one are in the other.

    Once literally, and once without case, width, punctuation and white space.
    """
    from g2rpo.data.overlap import overlap
    from g2rpo.data.prompts import read_prompt_set

    first, second = read_prompt_set(train), read_prompt_set(test)
    for path, found in ((train, first), (test, second)):
        _describe(path)
        if found.note:
            typer.echo(visible(found.note))
    shared = overlap(first.prompts, second.prompts)
    typer.echo(
        f"in both: {len(shared.exact)} prompts exactly, {len(shared.normalised)} without case, "
        "punctuation and white space"
    )
    for text in shared.normalised[:EXAMPLES]:
        typer.echo(visible(f"  {text}"))
    if len(shared.normalised) > EXAMPLES:
        typer.echo(f"  … and {len(shared.normalised) - EXAMPLES} more")
