"""``g2rpo raters``: blinded pairs of images for human raters, and their answers."""

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.text import visible
from reproduce.commands.options import Results

if TYPE_CHECKING:
    from reproduce.raters.answers import Rate, Verdict

app = typer.Typer(no_args_is_help=True, help="Ask human raters about blinded pairs of images.")
Side = Annotated[str, typer.Argument(help="A run, one of its evaluations, or a folder of images.")]


@app.command()
def make(
    first: Side,
    second: Side,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Output folder of the sheet; must not exist.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="Prompt set; its ids name the images.")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(min=2, help="Number of pairs, drawn at random; default: all.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the order and the sides; keep it from the raters."),
    ] = None,
    question: Annotated[str | None, typer.Option(help="The question for the raters.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip images without a prompt, and list them.")
    ] = False,
    results: Results = Path("results"),
) -> None:
    """Write a sheet of image pairs: same prompt and noise, two models, in random order.

    Give the folder to the raters. The key is written next to it.
    """
    from reproduce.raters.pictures import find_sides
    from reproduce.raters.sheet import PAGE, QUESTION, check_output, key_path, make_sheet

    check_output(output)
    sides = find_sides([first, second], results, prompts, skip_bad=skip_bad)
    for side in sides:
        for name, reason in side.left_out:
            typer.echo(visible(f"{side.label}: skipped {name}: {reason}"), err=True)
    chosen = secrets.randbits(62) if seed is None else seed
    key = make_sheet(sides, output, pairs=pairs, seed=chosen, question=question or QUESTION)
    evaluated = max(side.prompts for side in sides)
    typer.echo(f"{output / PAGE}: {len(key.pairs)} pairs (of {evaluated} prompts)")
    typer.echo(f"{key_path(output)}: the key; keep it from the raters")
    if key.protocol is None:
        typer.echo("warning: the two sides may not share their noise", err=True)


@app.command()
def read(
    key: Annotated[Path, typer.Argument(help="The key of the sheet.")],
    answers: Annotated[list[Path], typer.Argument(help="Raters' answers (.csv).")],
) -> None:
    """Print how often raters preferred the first model, with confidence intervals."""
    from reproduce.raters.answers import evaluate, read_answers
    from reproduce.raters.key import read_key

    pairs = read_key(key)
    _print(evaluate(pairs, read_answers(answers, pairs)))


def _print(verdict: "Verdict") -> None:
    from benchmarks.evaluation.statistics import ALPHA, p_equation
    from g2rpo.terminal import literal, plain_table, wide_console

    console = wide_console()
    console.print(literal(f"first:  {verdict.first}"))
    console.print(literal(f"second: {verdict.second}"))
    counts = verdict.outcomes
    console.print(
        f"{counts['first']} answers for the first, {counts['second']} for the second, "
        f"{counts['tie']} ties, {verdict.missing} missing"
    )
    table = plain_table("", "share", "95% interval", "over", right=("share",))
    rate, people = verdict.win_rate, verdict.over_raters
    table.add_row("first preferred", *_shown(rate.mean, rate.low, rate.high), f"{rate.count} pairs")
    if people is not None:
        shown = _shown(people.mean, people.low, people.high)
        table.add_row("first preferred", *shown, f"{people.count} raters")
    table.add_row("first, without ties", *_rate(verdict.decided))
    for rater, rate_of in verdict.raters.items():
        table.add_row(f"  {rater}, without ties", *_rate(rate_of))
    table.add_row("left image", *_rate(verdict.left))
    console.print(table)
    significant = verdict.p_value < ALPHA
    result = "statistically significant" if significant else "not statistically significant"
    agreement = "" if verdict.agreement is None else f"; raters agree on {verdict.agreement:.0%}"
    console.print(f"{p_equation(verdict.p_value)} over pairs: {result}{agreement}")


def _rate(rate: "Rate") -> tuple[str, str, str]:
    from benchmarks.evaluation.statistics import NOTHING

    shown = _shown(rate.share, rate.low, rate.high) if rate.count else (NOTHING, NOTHING)
    return (*shown, f"{rate.count} answers")


def _shown(share: float, low: float, high: float) -> tuple[str, str]:
    return f"{share:.3f}", f"{low:.3f} to {high:.3f}"
