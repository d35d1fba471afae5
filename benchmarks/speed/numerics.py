"""``python -m benchmarks.speed.numerics``: deviation of the ratio from 1 before an update.

Runs one iteration of G2RPO with bfloat16 blocks of FLUX.1-dev's width, heads and sequence length
and random weights (one double and one single block on the CPU, on a GPU as many as its memory
holds): eager and compiled, full and with adapters. Rollout and training differ in the batch that a
state is evaluated in, and in gradients. With a clip range of 1e-4, more than 2e-5 would be noise in
the objective.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import run
from benchmarks.speed.report import markdown_table, write_report
from benchmarks.speed.sizes import FluxShape, Models, Size, deepest_flux, random_flux
from g2rpo.provenance import provenance
from g2rpo.training.loop import Trainer

OUTPUT = Path("results/numerics")
TOLERANCE = 2e-5
FULL: dict[str, Any] = {"lora": None}
ADAPTERS: dict[str, Any] = {"lora": {"rank": 16, "alpha": 32.0}}


def deviation(size: Size, models: Models, run: Path, *, compiled: bool, **changes: Any) -> float:
    """Largest |ratio - 1| before the update of one iteration."""
    execution = {
        "compile": compiled,
        "trackers": [],
        "rollout_micro_batch": 2,
        "training_micro_batch": 1,
    }
    # The tolerance must not stop the run: the deviation is the result.
    optimization = {"learning_rate": 1e-6, "iterations": 1, "ratio_tolerance": 1.0}
    config = size.config(models, execution=execution, optimization=optimization, **changes)
    return float(Trainer(config, run).iterate()["ratio_deviation"])


def deviations(
    size: Size, models: Models, folder: Path, compiled: Sequence[bool] = (False, True)
) -> dict[str, float]:
    """Largest |ratio - 1| of each kind of training, full and with adapters."""
    found: dict[str, float] = {}
    for kind, changes in (("full", FULL), ("adapters", ADAPTERS)):
        for each in compiled:
            label = f"{kind}, {'compiled' if each else 'eager'}"
            run = folder / label.replace(", ", "-")
            found[label] = deviation(size, models, run, compiled=each, **changes)
            typer.echo(f"{label}: {found[label]:.2e}")
    return found


def main(
    resolution: Annotated[int, typer.Option(help="Image size in pixels.")] = 720,
    output: Annotated[Path, typer.Option(help="Output folder.")] = OUTPUT,
) -> None:
    """Measure the deviation of the ratio and write ratio.json and ratio.md."""
    if torch.cuda.is_available():
        shape = deepest_flux(torch.cuda.mem_get_info()[1])
    else:  # the decoder does not affect the ratio
        shape = FluxShape(1, 1, channels=(16, 16, 16, 16), norm_groups=4)
    policy = {"resolution": resolution, "dtype": "bfloat16"}
    size = Size("numerics", random_flux, 4, 2, (1, 2), policy, rank=16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = random_flux(folder, shape, random_reward=False)
        found = deviations(size, models, folder)
    result = {
        "provenance": provenance({}),
        "settings": {
            "blocks": [shape.double_blocks, shape.single_blocks], "resolution": resolution,
            "text_tokens": shape.text_tokens, "heads": shape.heads,
            "head_width": shape.head_width, "dtype": "bfloat16",
        },
        "ratio_deviation": found,
        "tolerance": TOLERANCE,
    }  # fmt: skip
    write_report(output, "ratio", result, report(result))
    worst = max(found.values())
    typer.echo(f"largest: {worst:.2e}, tolerance {TOLERANCE:g}")
    if not worst <= TOLERANCE:
        raise SystemExit(1)


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    settings, provenance = result["settings"], result["provenance"]
    double, single = settings["blocks"]
    rows = [[name, f"{value:.1e}"] for name, value in result["ratio_deviation"].items()]
    table = markdown_table(["training, blocks", "largest deviation"], rows, "---:")
    return (
        "# The ratio before an update at FLUX's shape\n\n"
        f"{double} double and {single} single blocks of {settings['heads']} heads of width "
        f"{settings['head_width']}, random weights, {settings['dtype']}, "
        f"{settings['resolution']}×{settings['resolution']} pixels and "
        f"{settings['text_tokens']} text tokens. Device: {provenance['hardware']['device']}, torch "
        f"{provenance['packages']['torch']}, commit {provenance['git_commit']}. Largest deviation "
        f"of the ratio from 1; training stops above {result['tolerance']:g}.\n\n"
        f"{table}\n"
    )


if __name__ == "__main__":
    run(main)
