"""Runs an experiment on this machine: cells in parallel workers, then tables and figures."""

import importlib
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.cells import Cell, load_cell
from g2rpo.errors import UserError
from g2rpo.progress import ProgressReport, duration
from reproduce import runs, stages
from reproduce.experiment import ROOT, Experiment, Profile, ResolvedCell
from reproduce.quiet import quiet_libraries
from reproduce.render.notes import Gap
from reproduce.stages import Layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of the cells.

    Attributes:
        cells: the finished ones.
        gaps: the failed ones, with the reason.
    """

    cells: tuple[Cell, ...]
    gaps: tuple[Gap, ...]


def check_hardware(profile: Profile, experiment: Experiment) -> None:
    """Refuses a profile that this machine or this version cannot run.

    Sampling and scoring alone take one GPU, however many the training takes.

    Raises:
        UserError: one line that names what is missing and how to mend it.
    """
    needs = profile.hardware
    mend = "PROFILE=mini runs the same experiment here"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not experiment.trains:
        if found < min(1, needs.gpus):
            raise UserError(
                f"profile {profile.name} needs a GPU of {needs.gpu_memory_gb} GB or more to sample "
                "and this machine shows none; run it where there is one"
            )
        return
    if found < needs.gpus:
        raise UserError(
            f"profile {profile.name} needs {needs.gpus} GPUs of {needs.gpu_memory_gb} GB or more "
            f"and this machine shows {found}; {mend}"
        )


def build_assets(profile: Profile) -> None:
    """Builds the files of a profile that makes its own."""
    if profile.build is None or profile.assets is None:
        return
    module, _, name = profile.build.partition(":")
    importlib.import_module(module).__dict__[name](ROOT / profile.assets)


def default_jobs() -> int:
    """Workers: one per core and at most eight; one where a GPU does the work.

    On small models two single-threaded workers do more than one worker with two threads.
    """
    if torch.cuda.is_available():
        return 1
    return max(1, min(8, os.cpu_count() or 1))


def run_cells(cells: Sequence[ResolvedCell], layout: Layout, experiment: str, jobs: int) -> Outcome:
    """Trains, samples, scores and collects every cell; a failed one does not stop the others."""
    runs.git_state()
    finished: list[Cell] = []
    gaps: list[Gap] = []
    todo = []
    for cell in cells:
        if stages.state(cell, layout) == "done":
            known = stages.collected(cell, layout, experiment)
            finished.append(known or load_cell(stages.collect(cell, layout, experiment)))
        else:
            todo.append(cell)
    started = time.monotonic()
    console = Console(stderr=True)
    for number, (cell, result) in enumerate(_completed(todo, layout, experiment, jobs), start=1):
        elapsed = time.monotonic() - started
        eta = duration(elapsed / number * (len(todo) - number))
        name = cell.key if cell.seed is None else f"{cell.key}, seed {cell.seed}"
        head = f"[{number}/{len(todo)}] {name}"
        tail = f"({duration(elapsed)} so far, ETA {eta})"
        if isinstance(result, Path):
            finished.append(load_cell(result))
            console.print(f"{head}: finished {tail}", highlight=False, markup=False)
        else:
            gaps.append(Gap(cell.key, result, cell.seed))
            console.print(f"{head}: FAILED: {result} {tail}", highlight=False, markup=False)
    # In one order, whoever finished first: what is written from them must come out the same.
    finished.sort(key=lambda cell: (cell.info.row, cell.info.seed or 0))
    return Outcome(tuple(finished), tuple(gaps))


Results = list[tuple[ResolvedCell, Path | str]]
"""Each cell with the path of its result, or the reason why it has none."""


def _completed(
    todo: Sequence[ResolvedCell], layout: Layout, experiment: str, jobs: int
) -> Iterator[tuple[ResolvedCell, Path | str]]:
    """The results of ``todo`` as they finish; cells of one training run stay in one worker."""
    by_run: dict[Path, list[ResolvedCell]] = {}
    for cell in todo:
        by_run.setdefault(layout.training(cell), []).append(cell)
    if jobs == 1 or len(by_run) <= 1:
        for members in by_run.values():
            yield from _run_members(members, layout, experiment)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(
        max_workers=min(jobs, len(by_run)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(threads,),
    ) as pool:
        futures = {
            pool.submit(_run_members, members, layout, experiment): members
            for members in by_run.values()
        }
        for future in as_completed(futures):
            try:
                yield from future.result()
            except Exception as error:  # a worker that died must not lose the others' results
                reason = f"its worker stopped: {error!r}"
                yield from ((cell, reason) for cell in futures[future])


def _run_members(members: Sequence[ResolvedCell], layout: Layout, experiment: str) -> Results:
    return [(cell, run_cell(cell, layout, experiment)) for cell in members]


def _start_worker(threads: int) -> None:
    quiet_libraries()
    ProgressReport.bars = False
    torch.set_num_threads(threads)
    runs.git_state()  # of the code as it was imported, not as it is when the cell ends


def run_cell(cell: ResolvedCell, layout: Layout, experiment: str) -> Path | str:
    """Runs all stages of one cell; returns its result's path, or why it failed in one line."""
    steps: tuple[Callable[[], object], ...] = (
        lambda: stages.train(cell, layout),
        lambda: stages.score(cell, layout),
    )
    try:
        for step in steps:
            step()
        return stages.collect(cell, layout, experiment)
    except UserError as error:
        return str(error)


def report(experiment: Experiment, profile: Profile, outcome: Outcome, layout: Layout) -> None:
    """Writes tables, figures and the reading of an experiment and prints the table."""
    # Drawing is not needed by workers, and importing it takes seconds.
    from reproduce.publish import publish

    publish(experiment, profile, outcome.cells, outcome.gaps, layout)
