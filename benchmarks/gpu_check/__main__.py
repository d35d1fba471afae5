"""Runs every check in its own process, within a time limit, and writes one report.

Exit code 1 if a check fails, 2 without a GPU.
"""

import multiprocessing
import os
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import run
from benchmarks.gpu_check.checks import CHECKS, Check, Measured, Place, run_check
from benchmarks.speed.report import markdown_table, write_report
from g2rpo.errors import UserError
from g2rpo.files import read_json
from g2rpo.provenance import provenance

OUTPUT = {"cuda": Path("results/gpu"), "cpu": Path("build/gpu-check")}


@dataclass
class Outcome:
    """A finished check: what it measured, and its seconds, of which it may take ``limit``."""

    name: str
    limit: float
    problem: str = ""
    """One line; empty if it passed."""
    seconds: float = 0.0
    measured: Measured = field(default_factory=dict)


def supervise(check: Check, place: Place, limit: float) -> Outcome:
    """Runs ``check`` in a process of its own, which is killed after ``limit`` seconds."""
    output = place.folder / "outcome.json"
    output.unlink(missing_ok=True)
    started = time.monotonic()
    process = _processes().Process(target=run_check, args=(check, place, output))
    process.start()
    process.join(limit)
    outcome = Outcome(check.name, limit)
    if process.exitcode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it has started
        process.kill()
        process.join()
        outcome.problem = f"not finished after {limit:.0f} s"
    elif output.exists():
        found = read_json(output)
        outcome.problem, outcome.measured = found["problem"], found["measured"]
    else:
        code = process.exitcode
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        outcome.problem = f"its process ended with {name}"
    outcome.seconds = time.monotonic() - started
    return outcome


def _processes() -> Any:
    # Forks a server that has imported everything and never uses CUDA, which a fork would break.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu_check.checks"])
    return context


def run_all(place: Place, budget: float) -> list[Outcome]:
    """Runs all checks within ``budget`` seconds: each gets its share of the time that is left."""
    started, outcomes = time.monotonic(), []
    for index, check in enumerate(CHECKS):
        left = budget - (time.monotonic() - started)
        # Twice its share, since the others rarely need theirs.
        share = 2 * check.share / sum(later.share for later in CHECKS[index:])
        outcome = supervise(check, place, max(1.0, left * min(1.0, share)))
        outcomes.append(outcome)
        word = outcome.problem and f"failed: {outcome.problem}"
        typer.echo(f"{check.name}: {word or 'passed'} ({outcome.seconds:.0f} s)")
    return outcomes


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    origin, rows = result["provenance"], []
    for check in result["checks"]:
        shown = [f"{name}: {_text(value)}" for name, value in check["measured"].items()]
        verdict = f"**failed**: {check['problem']}" if check["problem"] else "passed"
        rows.append([check["name"], verdict, f"{check['seconds']:.0f}", "; ".join(shown)])
    table = markdown_table(["check", "result", "seconds", "measured"], rows)
    size = (
        "FLUX.1-dev's width and length, fewer blocks, random weights, 720×720 pixels"
        if result["device"] == "cuda" else "tiny models"
    )  # fmt: skip
    return (
        f"# What only a GPU shows\n\n{size}. Device: {origin['hardware']['device']}, torch "
        f"{origin['packages']['torch']}, commit {origin['git_commit']}.\n\n{table}\n"
    )


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for tiny models.")] = "cuda",
    minutes: Annotated[float, typer.Option(min=0.1, help="Time limit of all checks.")] = 8.0,
    output: Annotated[
        Path | None,
        typer.Option(help="Output folder; results/gpu or, on the CPU, build/gpu-check."),
    ] = None,
) -> None:
    """Run every check and write check.json and check.md."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if device not in OUTPUT:
        raise UserError(f"--device {device}: no such device; use cuda or cpu")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise UserError("no CUDA GPU is usable here; --device cpu tries the checks on tiny models")
    with tempfile.TemporaryDirectory(prefix="g2rpo-gpu-") as folder:
        outcomes = run_all(Place(device, Path(folder)), 60 * minutes)
    checks = [asdict(outcome) for outcome in outcomes]
    result = {"provenance": provenance({}), "device": device, "minutes": minutes, "checks": checks}
    write_report(output or OUTPUT[device], "check", result, report(result))
    failed = [outcome.name for outcome in outcomes if outcome.problem]
    typer.echo(f"verdict: {'failed: ' + ', '.join(failed) if failed else 'passed'}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
