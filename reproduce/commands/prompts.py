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

app = typer.Typer(no_args_is_help=True, help="Fetch published prompt sets, and check your own.")
EXAMPLES = 10


@app.command("list")
def list_prompts() -> None:
    """List published prompt sets and whether they are cached. Works offline."""
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
        list[str] | None, typer.Argument(help="hpdv2 or hpsv2-benchmark; default: hpdv2.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Output folder; the flux profile reads the default one.")
    ] = Path("data/hpdv2"),
    mirror: Mirror = None,
    offline: Offline = False,
) -> None:
    """Fetch published prompt sets, verify them, and write them in the format of the flux profile.

    A fixed set of 400 validation prompts is held out of the training prompts.
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

    summary = summarise(path)
    typer.echo(
        visible(
            f"{path}: {summary.prompts} prompt{'s' * (summary.prompts != 1)} "
            f"({summary.distinct} distinct), {summary.words} words, "
            f"{summary.bytes} bytes, SHA-256 {summary.sha256}"
        )
    )


@app.command()
def check(
    train: Annotated[Path, typer.Argument(help="Training prompts (.txt, .csv, .json, ...).")],
    test: Annotated[Path, typer.Argument(help="Held-out prompts.")],
) -> None:
    """Count the prompts of two sets, and show those in both.

    Compares them exactly, and again ignoring case, width, punctuation and white space.
    """
    from g2rpo.data.overlap import overlap
    from g2rpo.data.prompts import read_prompt_set

    first, second = read_prompt_set(train), read_prompt_set(test)
    for path, read in ((train, first), (test, second)):
        _describe(path)
        if read.note:
            typer.echo(visible(read.note))
    shared = overlap(first.prompts, second.prompts)
    typer.echo(
        f"in both: {len(shared.exact)} prompts exactly, {len(shared.normalised)} ignoring case, "
        "punctuation and white space"
    )
    for text in shared.normalised[:EXAMPLES]:
        typer.echo(visible(f"  {text}"))
    if len(shared.normalised) > EXAMPLES:
        typer.echo(f"  … and {len(shared.normalised) - EXAMPLES} more")
