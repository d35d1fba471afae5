"""``g2rpo raters``: pairs of pictures for people to judge blindly, and their answers."""

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.text import visible
from reproduce.commands.options import Results

if TYPE_CHECKING:
    from reproduce.raters.answers import Rate, Verdict

app = typer.Typer(
    no_args_is_help=True, help="Human raters: blinded pairs of pictures, and their answers."
)
Side = Annotated[
    str, typer.Argument(help="A run, one of its evaluations, or a folder of pictures.")
]


@app.command()
def make(
    first: Side,
    second: Side,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the sheet; it must not be there yet.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="Prompt set whose ids name the pictures of folders.")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(min=2, help="So many pairs, drawn at random; default: all.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Names the order and the sides; who knows it can undo the blinding."),
    ] = None,
    question: Annotated[str | None, typer.Option(help="What raters are asked.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out pictures without a prompt, and list them.")
    ] = False,
    results: Results = Path("results"),
) -> None:
    """Write a sheet of pairs: the same prompt and noise under two models, in random order.

    The folder can be given to raters as it is. The key is written beside it.
    """
    from reproduce.raters.pictures import find_sides
    from reproduce.raters.sheet import PAGE, QUESTION, check_output, key_path, make_sheet

    check_output(output)
    sides = find_sides([first, second], results, prompts, skip_bad=skip_bad)
    for side in sides:
        for name, reason in side.left_out:
            typer.echo(visible(f"{side.label}: {name} is left out: {reason}"), err=True)
    chosen = secrets.randbits(62) if seed is None else seed
    key = make_sheet(sides, output, pairs=pairs, seed=chosen, question=question or QUESTION)
    evaluated = max(side.prompts for side in sides)
    typer.echo(f"{output / PAGE}: {len(key.pairs)} pairs (of {evaluated} prompts)")
    typer.echo(f"{key_path(output)}: the key; keep it from the raters")
    if key.protocol is None:
        typer.echo("that both sides were sampled from the same noise is not known", err=True)


@app.command()
def read(
    key: Annotated[Path, typer.Argument(help="The key that belongs to the sheet.")],
    answers: Annotated[list[Path], typer.Argument(help="Raters' answers (.csv).")],
) -> None:
    """Say how often the first model was preferred, with intervals, from the raters' answers."""
    from reproduce.raters.answers import judge, read_answers
    from reproduce.raters.key import read_key

    found = read_key(key)
    _print(judge(found, read_answers(answers, found)))


def _print(verdict: "Verdict") -> None:
    from benchmarks.evaluation.statistics import ALPHA, p_equation
    from g2rpo.terminal import literal, plain_table, wide_console

    console = wide_console()
    console.print(literal(f"first:  {verdict.first}"))
    console.print(literal(f"second: {verdict.second}"))
    counts = verdict.outcomes
    console.print(
        f"{counts['first']} answers for the first, {counts['second']} for the second, "
        f"{counts['tie']} ties, {verdict.missing} not given"
    )
    table = plain_table("", "share", "95% interval", "over", right=("share",))
    rate, people = verdict.win_rate, verdict.over_raters
    table.add_row("first preferred", *_shown(rate.mean, rate.low, rate.high), f"{rate.count} pairs")
    if people is not None:
        shown = _shown(people.mean, people.low, people.high)
        table.add_row("first preferred", *shown, f"{people.count} raters")
    table.add_row("first, without ties", *_rate(verdict.decided))
    for rater, found in verdict.raters.items():
        table.add_row(f"  {rater}, without ties", *_rate(found))
    table.add_row("left picture", *_rate(verdict.left))
    console.print(table)
    significant = verdict.p_value < ALPHA
    settled = "significant" if significant else "neither is preferred with significance"
    agreement = "" if verdict.agreement is None else f"; raters agree on {verdict.agreement:.0%}"
    console.print(f"{p_equation(verdict.p_value)} over the pairs: {settled}{agreement}")


def _rate(rate: "Rate") -> tuple[str, str, str]:
    return (*_shown(rate.share, rate.low, rate.high), f"{rate.count} answers")


def _shown(share: float, low: float, high: float) -> tuple[str, str]:
    return f"{share:.3f}", f"{low:.3f} to {high:.3f}"
