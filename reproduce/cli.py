"""The ``g2rpo`` command line."""

import sys
from typing import Annotated

import typer

from g2rpo.errors import UserError
from g2rpo.text import visible
from reproduce.commands import (
    catalogue,
    check,
    demo,
    evaluate,
    exchange,
    jobs,
    locales,
    prompts,
    raters,
    results,
    run,
    stages,
    weights,
)
from slurm.distributed import exit_rank

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

RUN, RESULTS, INPUTS = "Run experiments", "Look at results", "Weights, prompts and this machine"
COMMANDS = {
    RUN: (
        demo.demo, run.reproduce, run.plan, catalogue.power, catalogue.config, stages.train,
        stages.sample, stages.embed,
    ),
    "Score images": (
        stages.score, evaluate.evaluate, exchange.export_images, exchange.import_scores,
        exchange.serve_reward,
    ),
    "Follow jobs": (jobs.status, jobs.logs, jobs.cancel, jobs.retry),
    RESULTS: (
        results.runs, results.compare, results.agreement, results.render, results.report,
        results.export,
    ),
}  # fmt: skip
for panel, functions in COMMANDS.items():
    for function in functions:
        app.command(rich_help_panel=panel)(function)
app.command("list", rich_help_panel=RUN)(catalogue.list_bundled)
app.add_typer(raters.app, name="raters", rich_help_panel=RESULTS)
app.add_typer(weights.app, name="weights", rich_help_panel=INPUTS)
app.add_typer(prompts.app, name="prompts", rich_help_panel=INPUTS)
app.add_typer(check.app, name="check", rich_help_panel=INPUTS)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import version

    import torch

    from g2rpo.provenance import git_state

    commit, dirty = git_state()
    code = "" if commit is None else f" ({commit[:12]}{', modified' if dirty else ''})"
    typer.echo(f"g2rpo {version('g2rpo')}{code}")
    typer.echo(f"torch {torch.__version__}")
    typer.echo(f"CUDA {torch.version.cuda or 'not available: CPU build of torch'}")
    raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log informational messages as well.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log errors only.")] = False,
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the versions of g2rpo, torch and CUDA, and exit.",
        ),
    ] = False,
) -> None:
    """Train, sample, score and compare RL fine-tuning of flow-matching image models."""
    from g2rpo.quiet import log_level

    if verbose and quiet:
        raise typer.BadParameter("use --verbose or --quiet, not both")
    if verbose or quiet:
        log_level("INFO" if verbose else "ERROR")


def main() -> None:
    """Entry point.

    A :class:`UserError`, or a file that cannot be read or written, prints one line and exits with
    code 2. Any other exception is a bug and keeps its traceback.
    """
    from g2rpo.quiet import quiet_libraries

    locales.escape_output()
    try:
        if not {"--help", "-h"} & set(sys.argv):
            quiet_libraries()
        app()
    except (UserError, UnicodeError, OSError) as error:
        message = _one_line(error)
        if message is None:
            raise
        typer.echo(visible(f"error: {message}"), err=True)
        sys.exit(2)
    except SystemExit as left:
        # Typer turns an interrupt into an exit.
        if isinstance(getattr(left.__context__, "__cause__", None), KeyboardInterrupt):
            typer.echo("interrupted; run the same command to resume", err=True)
        elif note := locales.output_note():
            typer.echo(note, err=True)
        if left.code in (None, 0):
            exit_rank(0)
        raise


def _one_line(error: Exception) -> str | None:
    """The message for an error that the user can fix; None for a bug."""
    if isinstance(error, UnicodeError):
        return locales.explain(error)
    message = str(error)
    if isinstance(error, OSError):
        path = error.filename if error.filename2 is None else error.filename2
        if path is None:
            return None
        message = f"{path}: {' '.join((error.strerror or message).split())}"
    return message + locales.locale_note(*sys.argv)


if __name__ == "__main__":
    main()
