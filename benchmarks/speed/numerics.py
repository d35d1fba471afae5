"""``python -m benchmarks.speed.numerics``: how far the ratio is from 1 before an update.

Blocks of FLUX.1-dev's width, heads and sequence length with random weights, in bfloat16; on the CPU
one double and one single block, on a GPU all of them. An iteration of G2RPO is run whole, eager and
compiled, full and with adapters; what differs between rollout and training is the batch that a
state is evaluated in, and gradients. The clip range is 1e-4: more than 2e-5 would be noise in the
objective.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.speed.report import markdown_table, write_report
from benchmarks.speed.sizes import MINI, PROMPT, FluxShape, Models, Size, write_flux
from g2rpo.provenance import provenance
from g2rpo.quiet import quiet_libraries
from g2rpo.training.loop import Trainer

OUTPUT = Path("results/numerics")
TOLERANCE = 2e-5
BLOCKS = {"cpu": (1, 1), "cuda": (19, 38)}
FULL: dict[str, Any] = {"lora": None}
ADAPTERS: dict[str, Any] = {"lora": {"rank": 16, "alpha": 32.0}}


def _size(resolution: int) -> Size:
    return Size(
        "numerics", lambda folder: _models(folder, FluxShape()), steps=4, group_size=2,
        granularities=(1, 2), policy={"resolution": resolution, "dtype": "bfloat16"}, rank=16,
    )  # fmt: skip


def _models(folder: Path, shape: FluxShape) -> Models:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_flux(folder / "policy", shape, device)
    prompts = folder / "prompts.txt"
    prompts.write_text(PROMPT + "\n")
    return Models(folder / "policy", MINI / "rewards" / "hps", prompts)


def deviation(size: Size, models: Models, run: Path, *, compiled: bool, **changes: Any) -> float:
    """Largest |ratio - 1| before the update of one iteration."""
    execution = {
        "compile": compiled,
        "trackers": [],
        "rollout_micro_batch": 2,
        "training_micro_batch": 1,
    }
    # Nothing is refused here: the deviation is what is asked for.
    optimization = {"learning_rate": 1e-6, "iterations": 1, "ratio_tolerance": 1.0}
    config = size.config(models, execution=execution, optimization=optimization, **changes)
    return float(Trainer(config, run).iterate()["ratio_deviation"])


def main(
    resolution: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 720,
    output: Annotated[Path, typer.Option(help="Where the report goes.")] = OUTPUT,
) -> None:
    """Measures the four deviations and writes ``ratio.json`` and ``ratio.md``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    double, single = BLOCKS[device]
    shape = FluxShape(double_blocks=double, single_blocks=single)
    if device == "cpu":  # the decoder has no part in the ratio
        shape = replace(shape, channels=(16, 16, 16, 16), norm_groups=4)
    size = _size(resolution)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = _models(folder, shape)
        for kind, changes in (("full", FULL), ("adapters", ADAPTERS)):
            for compiled in (False, True):
                label = f"{kind}, {'compiled' if compiled else 'eager'}"
                run = folder / label.replace(", ", "-")
                found[label] = deviation(size, models, run, compiled=compiled, **changes)
                typer.echo(f"{label}: {found[label]:.2e}")
    result = {
        "provenance": provenance({}),
        "settings": {
            "blocks": [double, single], "resolution": resolution, "text_tokens": shape.text_tokens,
            "heads": shape.heads, "head_width": shape.head_width, "dtype": "bfloat16",
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
    """The measurement as a page of Markdown."""
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
        f"of the ratio from 1; more than {result['tolerance']:g} would stop a run.\n\n"
        f"{table}\n"
    )


if __name__ == "__main__":
    quiet_libraries()
    typer.run(main)
