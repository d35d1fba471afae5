"""Made-up cells and tables for tests of what is computed from them."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.evaluation.metrics import metric_frame
from benchmarks.evaluation.results import Cell, CellInfo, Cost, Protocol, Provenance
from reproduce.experiment.table import TableSpec
from reproduce.tables.formats import write_formats
from reproduce.tables.notes import Gap
from reproduce.tables.table import compute_table

REWARDS = ("hps", "clip", "attributes")


def make_scores(
    means: dict[str, float], *, prompts: int = 20, seed: int = 0, spread: float = 0.05
) -> pd.DataFrame:
    """Scores around ``means``; the prompts' own effect is the same whatever the seed."""
    effect = np.random.default_rng(99).normal(0, spread, prompts)
    noise = np.random.default_rng(seed)
    frames = [
        pd.DataFrame(
            {
                "prompt_id": [f"p{index:03d}" for index in range(prompts)],
                "reward": reward,
                "score": mean + effect + noise.normal(0, 0.01, prompts),
            }
        )
        for reward, mean in means.items()
    ]
    return pd.concat(frames, ignore_index=True)


def make_cell(
    row: str,
    *,
    seed: int | None,
    scores: pd.DataFrame,
    train: tuple[str, ...] = (),
    **changes: Any,
) -> Cell:
    """A cell of ``row``; its cost grows with the seed so that means over seeds can be told."""
    trained = seed is not None
    cost = Cost(
        rollout_evaluations=120_000 + 1000 * (seed or 0) if trained else 0,
        training_forwards=480 if trained else 0,
        training_backwards=480 if trained else 0,
        images_scored=17_280 if trained else 0,
        device_seconds=100.5 + (seed or 0) if trained else 0.0,
        iterations=60 if trained else 0,
        device="cpu",
    )
    fields: dict[str, Any] = {
        "row": row,
        "method": row.rsplit("/", 1)[-1],
        "train_rewards": train,
        "preset": "matched" if trained else None,
        "seed": seed,
        "protocol": Protocol(name="test-captions", hash="0123456789ab"),
        "runs": {"train": "aaaaaaaaaaaa", "score": f"{seed}"},
        "checkpoint_iteration": cost.iterations,
        "cost": cost,
        "provenance": Provenance(
            git_commit="c" * 40, git_dirty=False, packages={}, weights={}, hardware={}
        ),
    }
    return Cell(CellInfo(**(fields | changes)), scores)


def make_metrics(
    means: dict[str, float], *, prompts: int = 6, seed: int = 0, noise: float = 0.01
) -> pd.DataFrame:
    """Metrics of the first prompts around ``means``; the prompts' own effect is always the same."""
    effect = np.random.default_rng(98).normal(0, 0.05, prompts)
    draws = np.random.default_rng(seed)
    ids = [f"p{index:03d}" for index in range(prompts)]
    frames = [
        metric_frame(name, ids, mean + effect + draws.normal(0, noise, prompts))
        for name, mean in means.items()
    ]
    return pd.concat(frames, ignore_index=True)


COLUMNS = [
    {"reward": "hps", "label": "HPS", "paper": "HPS"},
    {"reward": "clip", "label": "CLIP", "paper": "CLIP"},
    {"reward": "attributes", "label": "Attributes", "paper": "UR"},
]


def _table1_row(method: str, label: str, train: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": f"{'-'.join(train)}/{method}",
        "label": label,
        "group": " & ".join(name.upper() for name in train),
        "train": train,
    }
    if method != "flow_grpo":
        row["paper"] = {"train": [name.upper() for name in train], "method": method}
    return row


TABLE1: dict[str, Any] = {
    "name": "table1",
    "title": "Table 1: held-out scores",
    "paper_table": "table1",
    "columns": COLUMNS,
    "rows": [
        {
            "key": "base",
            "label": "Base",
            "group": "nothing",
            "paper": {"train": [], "method": "flux.1-dev"},
        },
        *(
            _table1_row(method, label, train)
            for train in (["hps"], ["hps", "clip"])
            for method, label in (
                ("dance_grpo", "DanceGRPO"),
                ("mix_grpo", "MixGRPO"),
                ("flow_grpo", "Flow-GRPO"),
                ("g2rpo_no_mgai", "G²RPO w/o MGAI"),
                ("g2rpo", "G²RPO"),
            )
        ),
    ],
    "focus": ["hps/g2rpo", "hps-clip/g2rpo"],
    "baseline": "base",
}

TABLE2: dict[str, Any] = {
    "name": "table2",
    "title": "Table 2: granularities Λ",
    "paper_table": "table2",
    "row_label": "Λ",
    "columns": COLUMNS,
    "rows": [
        {
            "key": "granularity/" + "-".join(str(one) for one in granularities),
            "label": "{" + ", ".join(str(one) for one in granularities) + "}",
            "train": ["hps", "clip"],
            "paper": {"granularities": granularities},
        }
        for granularities in ([1], [1, 2], [1, 3], [1, 2, 3])
    ],
}

TABLE3: dict[str, Any] = {
    "name": "table3",
    "title": "Table 3: inference steps",
    "paper_table": "table3",
    "group_label": "Steps",
    "columns": COLUMNS,
    "rows": [
        {
            "key": f"steps-{steps}/{method}",
            "label": label,
            "group": str(steps),
            "train": ["hps", "clip"],
            "paper": {"steps": steps, "method": method},
        }
        for steps in (10, 20)
        for method, label in (("mix_grpo", "MixGRPO"), ("g2rpo", "G²RPO"))
    ],
}


def make_table_cells(
    spec: TableSpec, *, seeds: int = 3, leave_out: tuple[str, ...] = ()
) -> list[Cell]:
    """Cells for every row of a table but ``leave_out``; later rows are a little better."""
    cells = []
    for place, row in enumerate(spec.rows):
        if row.key in leave_out:
            continue
        changes: dict[str, Any] = {}
        if row.key.startswith("steps-"):
            steps = row.key.split("/")[0]
            changes["protocol"] = Protocol(name=steps, hash=f"hash-{steps}")
        for seed in range(seeds) if row.train else (None,):
            means = dict.fromkeys(REWARDS, 0.3 + 0.01 * place)
            scores = make_scores(means, seed=1000 * place + (seed or 0))
            cells.append(make_cell(row.key, seed=seed, scores=scores, train=row.train, **changes))
    return cells


def render(
    spec: TableSpec,
    cells: Sequence[Cell],
    folder: Path,
    profile: str = "mini",
    gaps: Sequence[Gap] = (),
) -> dict[str, str]:
    """The table's text in every format."""
    spec = spec.model_copy(update={"paper_model": profile == "flux"})
    written = write_formats(compute_table(spec, cells, profile, gaps), folder)
    return {kind: path.read_text() for kind, path in written.items()}


def csv_rows(text: str) -> list[dict[str, str]]:
    """The rows of a CSV text."""
    return list(csv.DictReader(io.StringIO(text)))
