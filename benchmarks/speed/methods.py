"""``python -m benchmarks.speed.methods``: an iteration of every method, and what its parts cost.

All methods under matched settings on one device, in turn: all weights, 8 prompts with groups of 8,
8 steps. A method should cost what its velocity evaluations cost: seconds per evaluation, in
sampling and in training, are compared with those of all methods together.
"""

import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import run
from benchmarks.speed.report import markdown_table, write_report
from benchmarks.speed.sizes import UNTOUCHED, Models, Size, size_named
from g2rpo.methods.presets import load_preset, method_label, preset_names
from g2rpo.policy.folder import checked_device
from g2rpo.provenance import provenance
from g2rpo.training.config import TrainConfig
from g2rpo.training.loop import Trainer

OUTPUT = Path("results/speed")
PHASES = ("seconds/sampling", "seconds/training")
COUNTED = ("rollout_evaluations", "training_forwards", "training_backwards", "images_scored")


def configs(size: Size, models: Models, device: str) -> dict[str, TrainConfig]:
    """The training configuration of each method, by its label."""
    shared = {
        "lora": None,
        "grid": {"steps": 8, "shift": 3.0, "timestep": "truncated"},
        "rollout": {"group_size": 8, "prompts_per_iteration": 8},
        "execution": {"trackers": [], "device": device} | size.execution,
    }
    found = {}
    for name in preset_names():
        preset = load_preset(name, "matched")
        optimization = {"learning_rate": UNTOUCHED, **preset.pop("optimization", {})}
        config = size.config(models, optimization=optimization, **shared, **preset)
        found[method_label(name)] = config
    return found


def measure(size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """The costs of one iteration of each method: counts, and the median seconds of ``repeats``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        methods = configs(size, size.prepare(folder), device.type)
        trainers = {label: Trainer(c, folder / label) for label, c in methods.items()}
        rows: dict[str, list[dict[str, Any]]] = {label: [] for label in methods}
        for _ in range(repeats + 1):  # the first warms up
            for label, trainer in trainers.items():
                rows[label].append(trainer.iterate())
    found = []
    for label, all_ in rows.items():
        spent = [
            {k: after[k] - before[k] for k in (*COUNTED, "device_seconds")}
            for before, after in itertools.pairwise(all_)
        ]
        counts = {key: statistics.mean(one[key] for one in spent) for key in COUNTED}
        seconds = {key: statistics.median(row[key] for row in all_[1:]) for key in PHASES}
        seconds["device_seconds"] = statistics.median(one["device_seconds"] for one in spent)
        found.append({"label": label, **counts, **seconds})
    return {
        "provenance": provenance({}), "size": size.name, "device": device.type,
        "threads": torch.get_num_threads(), "repeats": repeats, "methods": found,
    }  # fmt: skip


def per_evaluation(method: dict[str, Any]) -> tuple[float, float]:
    """Seconds of an evaluation in sampling and in training, where a backward counts as two."""
    trained = method["training_forwards"] + 2 * method["training_backwards"]
    sampled = method["seconds/sampling"] / method["rollout_evaluations"]
    return sampled, method["seconds/training"] / trained


def report(result: dict[str, Any]) -> str:
    """The page of a measurement."""
    each = {method["label"]: per_evaluation(method) for method in result["methods"]}
    usual = [statistics.median(column) for column in zip(*each.values(), strict=True)]
    rows = []
    for method in result["methods"]:
        relative = [own / all_ for own, all_ in zip(each[method["label"]], usual, strict=True)]
        rows.append(
            [
                method["label"],
                f"{method['rollout_evaluations']:.0f}",
                f"{method['training_forwards']:.0f}",
                f"{method['training_backwards']:.0f}",
                f"{method['images_scored']:.0f}",
                f"{method['device_seconds']:.2f}",
                f"{relative[0]:.2f}",
                f"{relative[1]:.2f}",
            ]
        )
    head = [
        "method", "rollout NFE", "forwards", "backwards", "images", "device-seconds",
        "sampling per evaluation", "training per evaluation",
    ]  # fmt: skip
    place = f"Size {result['size']} on {result['device']}, {result['threads']} thread(s)"
    return f"""# An iteration of every method

{place}, median of {result["repeats"]} iterations, methods in turn; 8 prompts, groups of 8,
8 steps, all weights trained. The last two columns are seconds per evaluation over the median of all
methods ({1000 * usual[0]:.2f} and {1000 * usual[1]:.2f} ms); a backward counts as two evaluations.
Where few states are trained, the optimizer step is a visible part.

{markdown_table(head, rows, "---:")}
"""


def main(
    size: Annotated[str, typer.Option(help="mini or tiny.")] = "mini",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Iterations of each method.")] = 5,
    output: Annotated[Path, typer.Option(help="Output folder.")] = OUTPUT,
) -> None:
    """Time an iteration of every method and write methods-SIZE.json and methods-SIZE.md."""
    chosen = size_named(size, ("mini", "tiny"))
    torch.set_num_threads(1)  # fastest for such small models
    result = measure(chosen, checked_device(device), repeats)
    write_report(output, f"methods-{size}", result, report(result))


if __name__ == "__main__":
    run(main)
