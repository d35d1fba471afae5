"""The proof that a change of structure changes no result.

Renders every committed table in every format and runs the smoke profile, and keeps or compares the
hashes. Those of the tables are the same on every machine, those of the smoke run on one machine:

    python tests/golden.py record build/golden.json   # before a change
    python tests/golden.py compare build/golden.json  # after it

With ``tables`` or ``smoke`` as a third argument only one of the two is compared.
"""

import hashlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from safetensors.numpy import load_file

from benchmarks.evaluation.results import Cell, load_cells
from reproduce.experiment import ROOT, load_experiment, load_profile
from reproduce.tables.equal_cost import equal_cost_markdown
from reproduce.tables.formats import write_formats
from reproduce.tables.model import Table
from reproduce.tables.table import compute_table
from reproduce.tables.terminal import print_table

RESULTS = ROOT / "results"
EXPERIMENTS = sorted(
    str(cells.parent.relative_to(RESULTS)) for cells in RESULTS.glob("mini*/*/cells")
)
"""The committed experiments, ``PROFILE/NAME``."""


@cache
def cells_of(experiment: str) -> list[Cell]:
    return load_cells(RESULTS / experiment / "cells")


def table_of(experiment: str) -> Table:
    profile, _, name = experiment.partition("/")
    spec = load_experiment(name).table_spec(load_profile(profile))
    return compute_table(spec, cells_of(experiment), profile)


def rendered(experiment: str, output: Path) -> dict[str, str]:
    """Every text that is rendered from the committed cells of an experiment, by file name."""
    table, config = table_of(experiment), load_experiment(Path(experiment).name).table
    texts = {path.name: path.read_text() for path in write_formats(table, output).values()}
    if "frontier" in config.figures:
        compared = equal_cost_markdown(table, cells_of(experiment), config.focus)
        texts[f"{table.name}_equal_cost.md"] = compared
    return texts


def printed(table: Table) -> str:
    """What the terminal shows of a table."""
    console = Console(file=io.StringIO(), width=200, color_system="truecolor", force_terminal=True)
    print_table(table, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def table_hashes() -> Iterator[tuple[str, str]]:
    for experiment in EXPERIMENTS:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in rendered(experiment, Path(folder)).items():
                yield f"{experiment}/{name}", digest(text.encode())
        yield f"{experiment}, terminal", digest(printed(table_of(experiment)).encode())


def smoke_hashes(results: Path) -> Iterator[tuple[str, list[str]]]:
    """Weights, scores and metrics of every cell of the smoke table, without seconds and dates."""
    command = [sys.executable, "-m", "reproduce.cli", "reproduce", "table1", "--profile", "smoke"]
    subprocess.run([*command, "--results", str(results)], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, list[str]] = {}
    for run in sorted((results / "runs").glob("*-*")):
        # Two rows may share the name, which ends with the hash of the configuration.
        row = run.name.rpartition("-")[0]
        for path in sorted((run / "checkpoints").glob("*/transformer/*.safetensors")):
            found.setdefault(f"{row} {path.parts[-3]} weights", []).append(weights_hash(path))
        for name in ("scores", "drift", "diversity"):
            for path in sorted(run.glob(f"evaluations/*/{name}.parquet")):
                text = pd.read_parquet(path).to_json(orient="records", double_precision=15)
                found.setdefault(f"{row} {name}", []).append(digest(text.encode()))
    tables = results / "runs" / "smoke" / "table1"
    frame = pd.read_csv(tables / "table1.csv")
    seconds = [column for column in frame if "seconds" in column]
    found["table1.csv"] = [digest(frame.drop(columns=seconds).to_csv().encode())]
    for name in sorted(found):
        yield f"smoke: {name}", sorted(found[name])


def weights_hash(path: Path) -> str:
    hasher = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        hasher.update(name.encode())
        hasher.update(np.ascontiguousarray(value).tobytes())
    return hasher.hexdigest()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main(verb: str, path: Path, part: str = "") -> int:
    hashes: dict[str, object] = {}
    if part != "smoke":
        hashes |= table_hashes()
    if part != "tables":
        with tempfile.TemporaryDirectory() as folder:
            hashes |= smoke_hashes(Path(folder))
    if verb == "record":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(hashes, indent=1) + "\n")
        print(f"{len(hashes)} hashes in {path}")
        return 0
    expected = {
        name: value
        for name, value in json.loads(path.read_text()).items()
        if not part or name.startswith("smoke:") == (part == "smoke")
    }
    different = sorted(n for n in hashes.keys() | expected if hashes.get(n) != expected.get(n))
    print("\n".join(f"differs: {name}" for name in different) or f"{len(hashes)} hashes equal")
    return int(bool(different))


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("record", "compare"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:4]))
