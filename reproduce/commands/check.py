"""``g2rpo check``: whether this machine, or this container, can run the suite."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reproduce.commands.weights import print_table

if TYPE_CHECKING:
    from reproduce.checks.finding import Finding


def check(
    results: Annotated[
        Path, typer.Option("--results", help="Folder that runs will write to.")
    ] = Path("results"),
    require_gpu: Annotated[
        bool, typer.Option("--require-gpu", help="Without a usable GPU it fails.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Look only; train and compute nothing.")
    ] = False,
) -> None:
    """Look at devices, versions and folders, and run everything once on tiny models.

    The last line is the verdict; exit code 2 where something must be mended.
    """
    from reproduce.checks.finding import sentence

    findings = _look(results, require_gpu=require_gpu)
    if not quick:
        usable = any(found.name == "GPU" and found.word in ("ok", "warning") for found in findings)
        findings += _compute(gpu=usable)
    columns = ("check", "verdict", "found", "seconds", "memory")
    print_table(columns, [finding.row() for finding in findings])
    text, ready = sentence(findings)
    typer.echo(text)
    if not ready:
        raise typer.Exit(2)


def _look(results: Path, *, require_gpu: bool) -> "list[Finding]":
    from huggingface_hub import constants

    from reproduce.checks import folders, machine

    devices = machine.find_devices()
    return [
        machine.check_machine(),
        machine.judge_devices(devices, required=require_gpu),
        machine.check_packages(),
        machine.check_code(),
        machine.check_shared_memory(len(devices.names)),
        folders.check_results(results),
        folders.check_cache(Path(constants.HF_HUB_CACHE), folders.missing_weights()),
    ]


def _compute(*, gpu: bool) -> "list[Finding]":
    from reproduce.checks.flux_blocks import check_blocks
    from reproduce.checks.whole_path import check_whole_path

    steps: list[Callable[[], Finding]] = [check_whole_path]
    if gpu:
        steps.append(check_blocks)
    return [step() for step in steps]
