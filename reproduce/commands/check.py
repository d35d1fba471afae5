"""``g2rpo check``: check that this machine, a cluster or an image can run the suite."""

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
Results = Annotated[Path, typer.Option("--results", help="Results folder that runs will write to.")]
Quick = Annotated[bool, typer.Option("--quick", help="Skip checks that train or compute.")]


class _MachineByDefault(typer.core.TyperGroup):
    """Makes ``machine`` the default: ``g2rpo check --quick`` is ``g2rpo check machine --quick``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ("--help", "-h")):
            args = ["machine", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_MachineByDefault,
    help="Check this machine (the default), a cluster or an image. The last line is the verdict; "
    "the exit code is 2 if something must be fixed.",
)


@app.command()
def machine(
    results: Results = Path("results"), require_gpu: RequireGpu = False, quick: Quick = False
) -> None:
    """Check devices, versions and folders, and run every stage once on tiny models."""
    from reproduce.checks.machine import check_machine

    conclude(check_machine(results, require_gpu=require_gpu, quick=quick))


@app.command()
def image(
    results: Results = Path("results"), require_gpu: RequireGpu = False, quick: Quick = False
) -> None:
    """Check the container image this runs in: like ``machine``, but stricter.

    Packages that differ from the lock file, or an unknown commit, are failures.
    """
    from reproduce.checks.machine import check_machine

    findings = check_machine(results, require_gpu=require_gpu, quick=quick)
    strict = ("packages", "code")
    conclude(
        [
            replace(one, word="failed") if one.what in strict and one.word == "warning" else one
            for one in findings
        ]
    )


@app.command()
def cluster(
    name: Annotated[
        str,
        typer.Option("--cluster", help="auto, slurm, local, a bundled cluster, or a YAML file."),
    ] = "auto",
    profile: Annotated[
        str, typer.Option("--profile", help="The profile to run: mini, flux, ... or a YAML file.")
    ] = "mini",
    results: Results = Path("results"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Submit no job; only query SLURM and check here.")
    ] = False,
) -> None:
    """Check that a cluster profile fits its cluster, using a tiny job."""
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
    """Prints the findings as a table, and the verdict as the last line.

    Raises:
        Exit: with code 2, if something failed.
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
    verdict = f"failed: {', '.join(failed)}" if failed else "ready"
    warned = f"; warnings: {', '.join(warnings)}" if warnings else ""
    typer.echo(f"verdict: {subject}{verdict}{warned}")
    if failed:
        raise typer.Exit(2)
