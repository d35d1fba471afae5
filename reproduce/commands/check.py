"""``g2rpo check``: whether this machine, a cluster or an image can run the suite."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from g2rpo.terminal import literal, plain_table, wide_console

if TYPE_CHECKING:
    from slurm.checks.finding import Finding

COLOURS = {"ok": "green", "note": "dim", "warning": "yellow", "failed": "red"}
RequireGpu = Annotated[bool, typer.Option("--require-gpu", help="Fail without a usable GPU.")]
Results = Annotated[Path, typer.Option("--results", help="Folder that runs will write to.")]
Quick = Annotated[bool, typer.Option("--quick", help="Only look; train and compute nothing.")]


class _MachineByDefault(typer.core.TyperGroup):
    """``g2rpo check`` and ``g2rpo check --quick`` mean ``g2rpo check machine``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ("--help", "-h")):
            args = ["machine", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_MachineByDefault,
    help="Can this machine, a cluster or an image run the suite? Without a word: this machine. "
    "The last line is the verdict; exit code 2 where something must be fixed.",
)


@app.command()
def machine(
    results: Results = Path("results"), require_gpu: RequireGpu = False, quick: Quick = False
) -> None:
    """Look at devices, versions and folders, and run everything once on tiny models."""
    from reproduce.checks.machine import check_machine  # imports torch: not for --help

    conclude(check_machine(results, require_gpu=require_gpu, quick=quick))


@app.command()
def image(
    results: Results = Path("results"), require_gpu: RequireGpu = False, quick: Quick = False
) -> None:
    """Check the container image that this runs in: as ``machine``, but more strictly.

    Packages that are not the locked ones, or an unknown commit, fail: an image has no excuse.
    """
    from reproduce.checks.machine import check_machine  # imports torch: not for --help

    found = check_machine(results, require_gpu=require_gpu, quick=quick)
    strict = ("packages", "code")
    conclude(
        [
            replace(one, word="failed") if one.what in strict and one.word == "warning" else one
            for one in found
        ]
    )


@app.command()
def cluster(
    name: Annotated[
        str,
        typer.Option("--cluster", help="auto, slurm, local, a bundled profile, or a YAML."),
    ] = "auto",
    profile: Annotated[
        str, typer.Option("--profile", help="The scale that is to run: smoke, mini, flux, a YAML.")
    ] = "mini",
    results: Results = Path("results"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Submit no job: only ask SLURM, and look here.")
    ] = False,
) -> None:
    """Check that a cluster profile fits its cluster, with a tiny job that looks around there."""
    # Imported here for start-up time: these load the catalogue and the experiments.
    from reproduce.checks.scale import case_of, check_weights
    from reproduce.experiment import load_profile
    from slurm.checks.cluster import check_cluster
    from slurm.cluster import load_cluster

    chosen = load_profile(profile)
    place = load_cluster(name, gpus=chosen.hardware.gpus)
    weights, cached = check_weights(profile)
    case = case_of(chosen, place, results, cached)
    case = replace(case, quick=quick, tell=lambda line: typer.echo(line, err=True))
    conclude([*check_cluster(case), weights], f"cluster {place.name}, profile {chosen.name}: ")


def conclude(findings: Sequence["Finding"], subject: str = "") -> None:
    """Prints a table, nothing cut where it is not a terminal, and the verdict as the last line.

    Raises:
        Exit: with code 2, something failed.
    """
    measured = any(finding.seconds is not None for finding in findings)
    table = plain_table("", "what", "found", "how to fix it", *["seconds", "memory"] * measured)
    for finding in findings:
        row = [finding.what, finding.found, finding.fix]
        if measured:
            seconds, memory = finding.seconds, finding.memory
            row.append("" if seconds is None else f"{seconds:.1f}")
            row.append("" if memory is None else f"{memory / 2**30:.1f} GiB")
        table.add_row(literal(finding.word, COLOURS[finding.word]), *row)
    wide_console().print(table)
    failed = [finding.what for finding in findings if finding.word == "failed"]
    warnings = [finding.what for finding in findings if finding.word == "warning"]
    verdict = f"failed, to fix: {', '.join(failed)}" if failed else "ready"
    warned = f"; {len(warnings)} to look at: {', '.join(warnings)}" if warnings else ""
    typer.echo(f"verdict: {subject}{verdict}{warned}")
    if failed:
        raise typer.Exit(2)
