"""``g2rpo prompts``: list, fetch and check prompt sets."""

from pathlib import Path
from typing import Annotated

import typer

from g2rpo.config import nearest
from g2rpo.errors import UserError
from g2rpo.terminal import plain_table, wide_console
from g2rpo.text import visible
from reproduce.commands.weights import Mirror, Offline, fetch_options

app = typer.Typer(no_args_is_help=True, help="Fetch published prompt sets, and check your own.")
EXAMPLES = 10


@app.command("list")
def list_prompts() -> None:
    """List published prompt sets, whether they are cached or written, and hashes. Works offline.

    The hash is that of the file that was written, else of the published one where it is known.
    """
    from g2rpo.files import sha256_file
    from g2rpo.hub.lock import expected, read_lock
    from g2rpo.hub.prompt_sets import SETS, artifact_named
    from g2rpo.hub.status import artifact_state

    lock = read_lock()
    columns = ("set", "list", "prompts", "categories", "licence", "page", "state", "SHA-256")
    table = plain_table(*columns)
    for set_name, files in SETS.items():
        for name, file in files.items():
            artifact, written = artifact_named(name), Path("data") / file
            state: str = artifact_state(artifact, lock).word
            hashes = [expected(artifact, published, lock).sha256 for published in artifact.files]
            sha256 = hashes[0] if len(hashes) == 1 else None
            if written.is_file():
                state, sha256 = f"{state}, written", sha256_file(written)
            table.add_row(
                set_name,
                name,
                str(artifact.prompts or "?"),
                str(artifact.categories or "–"),
                artifact.licence or "not stated",
                artifact.page,
                state,
                sha256 or "–",
            )
    wide_console().print(table)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Sets from `g2rpo prompts list`; default: hpdv2."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Output folder; default: data/hpdv2 and data/prompts."),
    ] = None,
    mirror: Mirror = None,
    offline: Offline = False,
) -> None:
    """Fetch published prompt sets, verify them, and write them as profiles and `score` read them.

    Of hpdv2, a fixed set of 400 validation prompts is held out of the training prompts.
    """
    from g2rpo.hub.lock import read_lock
    from g2rpo.hub.prompt_sets import SETS, fetch_set

    chosen = names or ["hpdv2"]
    for name in chosen:
        if name not in SETS:
            raise UserError(f"unknown prompt set {name!r}; {nearest(name, SETS)}")
    lock, options = read_lock(), fetch_options(mirror, offline=offline)
    for name in chosen:
        for path in fetch_set(name, output, lock, options):
            _describe(path)


def _describe(path: Path) -> None:
    from g2rpo.data.overlap import normalise
    from g2rpo.data.prompts import read_prompts
    from g2rpo.files import sha256_file

    texts = [prompt.text for prompt in read_prompts(path)]
    typer.echo(
        visible(
            f"{path}: {len(texts)} prompt{'s' * (len(texts) != 1)} "
            f"({len(set(map(normalise, texts)))} distinct), {len(' '.join(texts).split())} words, "
            f"{path.stat().st_size} bytes, SHA-256 {sha256_file(path)}"
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
    exact, normalised = overlap(first.prompts, second.prompts)
    typer.echo(
        f"in both: {len(exact)} prompts exactly, {len(normalised)} ignoring case, "
        "punctuation and white space"
    )
    for text in normalised[:EXAMPLES]:
        typer.echo(visible(f"  {text}"))
    if len(normalised) > EXAMPLES:
        typer.echo(f"  … and {len(normalised) - EXAMPLES} more")
