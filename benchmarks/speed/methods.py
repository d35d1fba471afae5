"""``python -m benchmarks.speed.methods``: an iteration of every method, and what its parts cost.

The methods of the experiment ``family`` on one device, in turn. A method should cost what its
velocity evaluations cost: seconds per evaluation, in sampling and in training, are compared with
those of all methods together.
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import run
from benchmarks.speed.report import markdown_table, write_report
from g2rpo.config import validate
from g2rpo.policy.folder import checked_device
from g2rpo.provenance import provenance
from g2rpo.training.config import TrainConfig
from g2rpo.training.loop import Trainer
from reproduce.experiment.cells import load_experiment
from reproduce.experiment.profile import load_profile
from reproduce.experiment.resolving import resolve

OUTPUT = Path("results/speed")
SECONDS = ("device_seconds", "seconds/sampling", "seconds/training")
COUNTED = ("rollout_evaluations", "training_forwards", "training_backwards", "images_scored")


def config_of(profile: str, key: str, device: str) -> tuple[str, TrainConfig]:
    """A cell's label and training configuration, without checkpoints, previews and validations."""
    experiment = load_experiment("family")
    cell = resolve(experiment, load_profile(profile), key, 1)
    assert cell.train is not None
    settings = cell.train.model_dump() | {"validation": None, "pictures": None}
    settings["execution"] |= {"device": device, "trackers": []}
    settings["checkpoints"]["every_minutes"] = None
    (row,) = (r for r in experiment.table_spec(load_profile(profile)).rows if r.key == key)
    return row.label, validate(TrainConfig, settings, f"family, {key}")


def measure(profile: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """The costs of one iteration of each method: counts, and the median seconds of ``repeats``."""
    keys = [key for key, cell in load_experiment("family").cells.items() if cell.method]
    with tempfile.TemporaryDirectory() as folder:
        cells = {key: config_of(profile, key, str(device)) for key in keys}
        trainers = {key: Trainer(c, Path(folder) / key) for key, (_, c) in cells.items()}
        for trainer in trainers.values():
            trainer.iterate()  # warms up
        rows: dict[str, list[dict[str, Any]]] = {key: [] for key in keys}
        for _ in range(repeats):
            for key, trainer in trainers.items():
                before = trainer.iterate()
                after = trainer.iterate()
                spent = {k: after[k] - before[k] for k in (*COUNTED, "device_seconds")}
                rows[key].append(after | spent)
    methods = []
    for key, found in rows.items():
        cost = {name: statistics.median(row[name] for row in found) for name in SECONDS}
        counts = {name: statistics.mean(row[name] for row in found) for name in COUNTED}
        methods.append({"key": key, "label": cells[key][0], **counts, **cost})
    return {
        "provenance": provenance({}), "profile": load_profile(profile).name,
        "device": device.type, "threads": torch.get_num_threads(), "repeats": repeats,
        "methods": methods,
    }  # fmt: skip


def per_evaluation(method: dict[str, Any]) -> tuple[float, float]:
    """Seconds of an evaluation in sampling and in training, where a backward counts as two."""
    trained = method["training_forwards"] + 2 * method["training_backwards"]
    sampled = method["seconds/sampling"] / method["rollout_evaluations"]
    return sampled, method["seconds/training"] / trained


def report(result: dict[str, Any]) -> str:
    """The page of a measurement."""
    each = {method["key"]: per_evaluation(method) for method in result["methods"]}
    usual = [statistics.median(column) for column in zip(*each.values(), strict=True)]
    rows = []
    for method in result["methods"]:
        relative = [own / all_ for own, all_ in zip(each[method["key"]], usual, strict=True)]
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
    return f"""# An iteration of every method

Profile {result["profile"]} on {result["device"]}, {result["threads"]} thread(s), median of \
{result["repeats"]} iterations, methods in turn. The last two columns are
seconds per evaluation over the median of all methods ({1000 * usual[0]:.2f} and \
{1000 * usual[1]:.2f} ms); a backward counts as two evaluations.

{markdown_table(head, rows, "---:")}
"""


def main(
    profile: Annotated[str, typer.Option(help="The profile, with one rank.")] = "mini",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Iterations of each method.")] = 5,
    output: Annotated[Path, typer.Option(help="Output folder.")] = OUTPUT,
) -> None:
    """Time an iteration of every method and write methods-PROFILE.json and methods-PROFILE.md."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)  # fastest for such small models
    result = measure(profile, checked_device(device), repeats)
    write_report(output, f"methods-{result['profile']}", result, report(result))


if __name__ == "__main__":
    run(main)
