"""Sampling and scoring in shares: the same files as whole, whatever happened in between.

One image at a time everywhere, so that no difference is the rounding of another batch's sums (which
moves a pixel value in some thousands by one).
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from command_line import small_profile_data
from small_plan import experiment_of

from benchmarks.evaluation.results import Cell, load_cells
from g2rpo.config import validate
from reproduce.experiment import Profile, ResolvedCell, expand
from reproduce.experiment.layout import Layout
from reproduce.stages import sampling, scoring
from reproduce.stages.base import perform
from reproduce.stages.cells import Sample, Score, finish_cells, why_not
from reproduce.stages.evaluation_files import Share
from reproduce.stages.training import Train
from reproduce.tables.collecting import collect_all
from reproduce.tables.notes import Gap
from slurm.distributed import Ranks

CELLS: dict[str, Any] = {"base": {}, "hps/mix_grpo": {"method": "mix_grpo", "train": ["hps"]}}
MEASURED = ("scores.parquet", "diversity.parquet", "drift.parquet")


@pytest.fixture(scope="module", autouse=True)
def _one_image_at_a_time() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "SAMPLING_BATCH", 1)
        models: dict[str, Any] = {}  # loaded once: tests score in many shares
        load = scoring.load_reward

        def loaded(config: Any, device: str) -> Any:
            key = repr((config, device))
            return models[key] if key in models else models.setdefault(key, load(config, device))

        patch.setattr(scoring, "load_reward", loaded)
        yield


@pytest.fixture(scope="module")
def profile(smoke_assets: Path) -> Profile:
    data = small_profile_data(smoke_assets)
    data["rewards"] = {name: data["rewards"][name] | {"batch_size": 1} for name in ("hps", "clip")}
    data["evaluation"]["limit"] = 5
    return validate(Profile, data, "smoke")


def shared(profile: Profile, count: int) -> Profile:
    hardware = profile.hardware.model_copy(update={"evaluation_shares": count})
    return profile.model_copy(update={"hardware": hardware})


def cells_of(profile: Profile) -> list[ResolvedCell]:
    return expand(experiment_of(CELLS), profile, (1,))


@pytest.fixture(scope="module")
def trained(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in which the training is done, and both cells are sampled and scored whole."""
    runs = tmp_path_factory.mktemp("whole") / "runs"
    for cell in cells_of(profile):
        layout = Layout(runs, runs)
        perform(Train(layout, cell), Ranks())
        evaluate(cell, layout, 1)
    return runs


def evaluate(cell: ResolvedCell, layout: Layout, count: int) -> None:
    for kind in (Sample, Score):
        # The first share measures what there is one of, and needs the others' images.
        for index in reversed(range(count)):
            perform(kind(layout, cell, Share(index, count)), Ranks())


def gather(cells: list[ResolvedCell], layout: Layout) -> tuple[list[Cell], list[Gap]]:
    finished, gaps = finish_cells(cells, layout)
    found, damaged = collect_all(finished, layout, "t")
    return found, [*gaps, *damaged]


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """The same trainings, with nothing sampled."""
    copy = tmp_path / "runs"
    shutil.copytree(trained, copy)
    for folder in copy.glob("*/evaluations"):
        shutil.rmtree(folder)
    for folder in copy.glob("*/drift"):
        shutil.rmtree(folder)
    return copy


def same_as_whole(cell: ResolvedCell, runs: Path, trained: Path) -> None:
    part, whole = (Layout(folder, folder).evaluation(cell) for folder in (runs, trained))
    assert part.name == whole.name
    for name in MEASURED:
        pd.testing.assert_frame_equal(
            pd.read_parquet(part / name), pd.read_parquet(whole / name), check_exact=True
        )
    for folder in ("images", "diversity"):
        kept = [sorted(path.name for path in (one / folder).iterdir()) for one in (part, whole)]
        assert kept[0] == kept[1]
    assert not (part / "shares").exists()


def test_another_number_of_shares_in_between_loses_and_doubles_nothing(
    profile: Profile, runs: Path, trained: Path
) -> None:
    layout = Layout(runs, runs)
    cell = cells_of(profile)[1]
    for share in (Share(0, 3), Share(0, 2), Share(1, 2)):
        perform(Sample(layout, cell, share), Ranks())
    perform(Score(layout, cell, Share(1, 2)), Ranks())
    assert not Score(layout, cell).is_merged()
    assert all(Sample(layout, cell, Share(index, 3)).is_done() for index in range(3))
    evaluate(cell, layout, 3)
    assert Score(layout, cell).is_merged()
    same_as_whole(cell, runs, trained)
    # Nothing is left to do, in whatever shares.
    for count in (1, 2, 3):
        for kind in (Sample, Score):
            stages = [kind(layout, cell, Share(index, count)) for index in range(count)]
            assert all(stage.is_done() for stage in stages)


def test_shares_that_a_kill_left_unmerged_are_merged_by_the_table(
    profile: Profile, runs: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(runs, runs.parent / "tables")
    cells = cells_of(shared(profile, 2))
    base, cell = cells
    with monkeypatch.context() as patch:
        patch.setattr(Score, "finish", lambda _: False)
        evaluate(cell, layout, 2)
    perform(Sample(layout, base, Share(0, 2)), Ranks())
    assert not (layout.evaluation(cell) / "scores.parquet").exists()
    assert why_not(cell, layout) == "its scores are not merged yet"

    def killed(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("reproduce.stages.scoring.prune_images", killed)
        with pytest.raises(RuntimeError, match="killed"):
            Score(layout, cell, Share(0, 2)).finish()
    finished, gaps = gather(cells, layout)
    assert [one.info.row for one in finished] == ["hps/mix_grpo"]
    assert [(gap.row, gap.reason) for gap in gaps] == [("base", "sample has not run")]
    same_as_whole(cell, runs, trained)
    again, _ = gather(cells, layout)
    written = load_cells(layout.experiment("smoke", "t") / "cells")
    assert [one.info for one in again] == [one.info for one in written]
    with monkeypatch.context() as patch:
        patch.setattr(Score, "finish", lambda _: False)
        evaluate(base, layout, 2)
    with monkeypatch.context() as patch:
        patch.setattr("reproduce.stages.scoring.shutil.rmtree", killed)
        with pytest.raises(RuntimeError, match="killed"):
            Score(layout, base, Share(0, 2)).finish()
    assert Score(layout, base, Share(0, 2)).finish()
    shutil.rmtree(layout.evaluation(base) / "shares")  # left behind, and no longer needed
    same_as_whole(base, runs, trained)


def test_a_damaged_cell_is_collected_again(
    profile: Profile, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = Layout(trained, tmp_path / "tables")
    cells = cells_of(profile)
    whole, gaps = gather(cells, layout)
    assert (len(whole), gaps) == (2, [])
    folder = layout.experiment("smoke", "t") / "cells"
    written = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    for path, content in written.items():
        for damaged in (b"", content[:-9], content[:-9] + b"?" + content[-8:]):
            path.write_bytes(damaged)
            caplog.clear()
            found, gaps = gather(cells, layout)
            assert path.name in caplog.text
            assert ([one.info for one in found], gaps) == ([one.info for one in whole], [])
            assert {path: path.read_bytes() for path in sorted(folder.iterdir())} == written
        path.unlink()
        assert gather(cells, layout)[1] == []
        assert path.read_bytes() == content
