"""Made-up run folders, as trainings and evaluations leave them, for tests of what reads them."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from cell_factory import make_metrics, make_scores

from g2rpo.attempts import Record, attempt_path
from g2rpo.config import merge
from g2rpo.owner import Owner
from g2rpo.progress import WorkProgress
from g2rpo.training.checkpoint.folder import Progress, checkpoint_folder, write_state

PROVENANCE: dict[str, Any] = {
    "git_commit": "c" * 40,
    "git_dirty": False,
    "packages": {"torch": "2.14.1"},
    "weights": {"hps": "1" * 64},
    "hardware": {"device": "cpu"},
}
SETTINGS: dict[str, Any] = {
    "seed": 1,
    "rewards": {"hps": {"weight": 1.0}},
    "method": {"name": "g2rpo", "eta": 0.7},
    "optimization": {"iterations": 4, "learning_rate": 5e-5},
    "execution": {"compile": False},
}
PROTOCOL = {"split": "test", "grid": {"steps": 20}, "seed": 1}


def write_run(
    runs: Path,
    name: str,
    *,
    iterations: int = 4,
    finished: bool = True,
    means: dict[str, float] | None = None,
    **changes: Any,
) -> Path:
    """A run of ``iterations``, evaluated where ``means`` of its scores are given."""
    folder = runs / name
    settings = merge(SETTINGS, changes)
    write(folder / "config.json", settings)
    seed = settings["seed"]
    rows = [
        {
            "iteration": i,
            "rollout_evaluations": 100 * i,
            "training_forwards": 10 * i,
            "training_backwards": 10 * i,
            "images_scored": 8 * i,
            "device_seconds": 2.0 * i,
            "seconds": 2.0 * i,
            "validation/hps": 0.5 + 0.01 * i + 0.001 * seed,
            **({"reward/hps/mean": 0.4 + 0.01 * i} if i else {}),
        }
        for i in range(iterations + 1)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    if finished:
        progress = {k: v for k, v in rows[-1].items() if "/" not in k and k != "seconds"}
        manifest = {"stage": "train", "seed": seed, "progress": progress}
        write(folder / "manifest.json", manifest | {"provenance": PROVENANCE})
        write_checkpoint(folder, iterations)
    if means is not None:
        write_evaluation(folder, means, seed)
    return folder


def write_checkpoint(run: Path, iteration: int) -> Path:
    """A checkpoint of a run, with a file in place of weights."""
    folder = checkpoint_folder(run, iteration)
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "weights.safetensors").write_bytes(b"weights")
    write_state(folder, Progress(iteration=iteration))
    return folder


def write_evaluation(folder: Path, means: dict[str, float], seed: int | None = None) -> None:
    """The scores of an evaluation around ``means``, and measures beside them."""
    place = folder / "evaluations" / "test-0123456789ab"
    inputs = {"protocol": PROTOCOL, "prompts": "2" * 64}
    write(place / "manifest.json", {"stage": "score", "inputs": inputs, "provenance": PROVENANCE})
    make_scores(means, seed=seed or 0).to_parquet(place / "scores.parquet", index=False)
    metrics = make_metrics({"diversity/vendi": 2.0}, seed=seed or 0)
    metrics.to_parquet(place / "diversity.parquet", index=False)


def write_attempt(lease: Path, state: str, *, alive: bool = True, **progress: Any) -> None:
    """The first attempt at the work whose lease is at ``lease``."""
    owner = Owner.this_process()
    if not alive:
        owner = owner.model_copy(update={"process_start": 1.0})
    now = time.time()
    record = Record.model_validate(
        {
            "attempt": 1,
            "owner": owner,
            "state": state,
            "reason": progress.pop("reason", ""),
            "progress": WorkProgress(**progress),
            "started": now,
            "updated": now,
            "node": "node07",
        }
    )
    path = attempt_path(lease, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json())


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, default=float))


def prompt_means(means: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """The scores that :func:`write_evaluation` writes, by reward, in the order of the prompts."""
    scores = make_scores(means, seed=seed)
    scores["score"] = scores["score"].astype("float32")
    return {str(k): v["score"].to_numpy(np.float64) for k, v in scores.groupby("reward")}


DAMAGE: tuple[tuple[str, bytes], ...] = (
    ("metrics.jsonl", b'3\n{"iteration": 1}\n'),
    ("metrics.jsonl", b'{"reward/hps/mean": 0.5}\n{"iteration": 1}\n'),
    ("metrics.jsonl", b'{"note": "\xff"}\n{"iteration": 1}\n'),
    ("metrics.jsonl", b'{"iteration": 1, "reward/hps/mean": null}\n'),
    ("manifest.json", b"\xff\xfe\x00"),
    ("manifest.json", b"{}"),
    ("manifest.json", b"[]"),
    ("manifest.json", b'{"provenance": '),
    ("evaluations/test-0123456789ab/manifest.json", b"{}"),
    ("evaluations/test-0123456789ab/manifest.json", b"\xff"),
    ("config.json", b"{}"),
    ("config.json", b"[]"),
    ("config.json", b"\xff"),
    *(("config.json", json.dumps(SETTINGS | changed).encode()) for changed in (
        {"seed": "one"}, {"optimization": None}, {"method": {}}, {"rewards": [1]},
    )),
)  # fmt: skip
"""Files of a run folder, and contents with which they are damaged."""


def damage(folder: Path, file: str, content: bytes) -> None:
    assert (folder / file).is_file()
    (folder / file).write_bytes(content)
