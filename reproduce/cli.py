"""The ``g2rpo`` command: one verb per stage, and ``reproduce`` for a whole experiment."""

import sys

import typer

from g2rpo.errors import UserError
from g2rpo.text import visible
from reproduce.commands import (
    check,
    compare,
    demo,
    embed,
    export,
    jobs,
    locales,
    prompts,
    raters,
    render,
    report,
    run,
    stages,
    weights,
)
from reproduce.commands.config import config
from slurm.distributed import exit_rank

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, sample, score and compare RL fine-tuning of flow-matching image models.",
)
app.add_typer(check.app, name="check")
app.add_typer(weights.app, name="weights")
app.add_typer(prompts.app, name="prompts")
app.add_typer(raters.app, name="raters")

for verb in (
    run.reproduce,
    run.plan,
    config,
    stages.train,
    stages.sample,
    stages.score,
    render.render,
    jobs.status,
    jobs.logs,
    jobs.cancel,
    jobs.retry,
    compare.runs,
    compare.compare,
    demo.demo,
    embed.embed,
    export.export,
    report.report,
):
    app.command()(verb)


def main() -> None:
    """Entry point: a mistake of the user's is one line and exit code 2, without a traceback.

    So is a file that cannot be read or written; other errors are bugs and keep their traceback.
    """
    from g2rpo.quiet import quiet_libraries

    locales.escape_output()
    try:
        if not {"--help", "-h"} & set(sys.argv):
            quiet_libraries()
        app()
    except (UserError, UnicodeError, OSError) as error:
        told = _refusal(error)
        if told is None:
            raise
        typer.echo(visible(f"error: {told}"), err=True)
        sys.exit(2)
    except SystemExit as left:
        # Typer makes an exit of an interruption.
        if isinstance(getattr(left.__context__, "__cause__", None), KeyboardInterrupt):
            typer.echo("interrupted; run the same command to go on", err=True)
        elif note := locales.output_note():
            typer.echo(note, err=True)
        if left.code in (None, 0):
            exit_rank(0)
        raise


def _refusal(error: Exception) -> str | None:
    """The one line for an error that is the user's to solve; None for any other."""
    if isinstance(error, UnicodeError):
        return locales.explain(error)
    told = str(error)
    if isinstance(error, OSError):
        path = error.filename if error.filename2 is None else error.filename2
        if path is None:
            return None
        told = f"{path}: {' '.join((error.strerror or told).split())}"
    return told + locales.locale_note(*sys.argv)


if __name__ == "__main__":
    main()
