"""What jobs read and do: cells as documents, leases around the work, nothing done twice."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_checkpoint

from g2rpo.attempts import read_attempts
from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.lease import Lease
from g2rpo.stop import Stopped
from reproduce.experiment import HERE, Profile, ResolvedCell, expand, load_experiment, load_profile
from reproduce.experiment.fingerprint import absent_inputs_named
from reproduce.experiment.layout import Layout
from reproduce.jobs.plan import make_plan
from reproduce.runs.state import latest_attempt
from reproduce.stages.base import perform
from reproduce.stages.cells import Score
from reproduce.stages.evaluation_files import Share
from reproduce.stages.inputs import Inputs
from reproduce.stages.run import load_stage
from reproduce.stages.training import Train
from slurm.distributed import Ranks

EXPERIMENTS = sorted(path.stem for path in (HERE / "experiments").glob("*.yaml"))


def cells_of(experiment: str, profile: Profile) -> list[ResolvedCell]:
    try:
        return expand(load_experiment(experiment), profile, (1,))
    except UserError:  # it is about another policy
        return []


def written_and_read(cell: ResolvedCell, profile: Profile) -> ResolvedCell:
    document = json.loads(cell.model_dump_json())
    return validate(ResolvedCell, document | {"profile": profile}, "test")


@pytest.mark.parametrize("profile", ["mini", "smoke"])
def test_every_bundled_cell_survives_being_written(profile: str, tmp_path: Path) -> None:
    loaded, count = load_profile(profile), 0
    layout = Layout(tmp_path, tmp_path)
    for experiment in EXPERIMENTS:
        cells = cells_of(experiment, loaded)
        assert len({cell.name for cell in cells}) == len(cells)
        for cell in cells:
            found = written_and_read(cell, loaded)
            assert found == cell
            with absent_inputs_named():
                assert layout.training(found) == layout.training(cell)
                assert layout.evaluation(found) == layout.evaluation(cell)
            if cell.train is not None and found.train is not None:
                # Equal mappings may differ in it, and it is part of a run's name and of its sums.
                assert list(found.train.rewards) == list(cell.train.rewards)
            count += 1
    assert count > 60


def test_a_submission_s_inputs_are_what_was_planned(tmp_path: Path) -> None:
    profile, experiment = load_profile("mini"), load_experiment("table1")
    cells = expand(experiment, profile, (1, 2))
    layout = Layout(tmp_path / "runs", tmp_path / "runs")
    plan = make_plan(experiment, profile, cells, layout)
    folder = tmp_path / "submission"
    inputs = Inputs(folder=folder, experiment=experiment, profile=profile,
                    runs=layout.runs, tables=layout.tables)  # fmt: skip
    inputs.save(cells)
    found = Inputs.load(folder)
    assert found == inputs and found.layout == layout
    assert sorted(map(repr, found.cells())) == sorted(map(repr, cells))
    for node in plan.graph.stages.values():
        stage = load_stage(found, node)
        assert (stage.name, stage.label, str(stage.lease)) == (node.name, node.label, node.lease)


def test_inputs_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="submit again"):
        Inputs.load(tmp_path)


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff", b'{"provenance": {', b"3"])
def test_a_stage_with_a_damaged_manifest_is_done_again(tmp_path: Path, content: bytes) -> None:
    layout = Layout(tmp_path, tmp_path)
    cell = expand(load_experiment("table1"), load_profile("mini"), (1,))[-1]
    share = Share(0, 2)
    with absent_inputs_named():
        train, score = Train(layout, cell), Score(layout, cell, share)
        run, evaluation = layout.training(cell), layout.evaluation(cell)
        for path in (run / "manifest.json", evaluation / "manifest.json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        score.scored_document.parent.mkdir()
        score.scored_document.write_bytes(content)
        assert not train.is_done() and not score.is_done()
        assert score.share_manifest() is None
        write_checkpoint(run, 4)
        (run / "manifest.json").write_text(
            json.dumps({"progress": {"iteration": 4}, "provenance": {}})
        )
        assert train.is_done()
        shutil.rmtree(run / "checkpoints")
        assert not train.is_done()


class Piece(Train):
    """A stage whose work is to write one file."""

    place: Path
    error: BaseException | None = None
    times = 0

    @property
    def lease(self) -> Path:
        return self.place / "leases" / "piece"

    def is_done(self) -> bool:
        return (self.place / "done").exists()

    def run(self) -> None:
        type(self).times += 1
        if self.error is not None:
            raise self.error
        (self.place / "done").touch()


@pytest.fixture
def piece(tmp_path: Path) -> Any:
    cell = expand(load_experiment("table1"), load_profile("mini"), (1,))[0]

    class Made(Piece):
        place = tmp_path

    return Made(Layout(tmp_path, tmp_path), cell)


def test_what_is_done_is_not_done_again(piece: Any, tmp_path: Path) -> None:
    perform(piece, Ranks())
    perform(piece, Ranks())
    assert type(piece).times == 1
    (attempt,) = read_attempts(tmp_path / "leases", "piece")
    assert attempt.state == "done"


@pytest.mark.parametrize(
    ("error", "state"),
    [(UserError("a mistake"), "failed"), (Stopped("a reason", resume=True), "stopped"),
     (ZeroDivisionError("a bug"), "failed")],
)  # fmt: skip
def test_an_attempt_says_how_it_ended(piece: Any, error: Exception, state: str) -> None:
    type(piece).error = error
    with pytest.raises(type(error)):
        perform(piece, Ranks())
    attempt = latest_attempt(piece.lease)
    assert attempt is not None and attempt.record is not None
    assert attempt.state == state
    assert ("a reason" if state == "stopped" else "a ") in attempt.record.reason
    type(piece).error = None
    perform(piece, Ranks())
    again = latest_attempt(piece.lease)
    assert again is not None and (again.number, again.state) == (2, "done")


def test_whoever_waited_for_the_owner_passes(
    piece: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("g2rpo.lease.POLL_SECONDS", 0.1)
    lease = Lease.acquire(tmp_path / "leases", "piece")
    waiter = threading.Thread(target=perform, args=(piece, Ranks()))
    waiter.start()
    waiter.join(timeout=0.5)
    assert waiter.is_alive()
    (tmp_path / "done").touch()
    lease.release("done")
    waiter.join(timeout=600)
    assert not waiter.is_alive() and type(piece).times == 0
    attempts = read_attempts(tmp_path / "leases", "piece")
    assert [attempt.state for attempt in attempts] == ["done", "done"]


def test_an_owner_that_does_not_end_is_named(piece: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G2RPO_LEASE_WAIT_SECONDS", "0.2")
    lease = Lease.acquire(piece.lease.parent, piece.lease.name)
    try:
        with pytest.raises(UserError, match="is locked by attempt 1"):
            perform(piece, Ranks())
    finally:
        lease.release("stopped")
    assert type(piece).times == 0


def test_shares_part_the_prompts() -> None:
    whole = list(range(7))
    for count in (1, 2, 3, 8):
        parts = [Share(index, count).of(whole) for index in range(count)]
        assert sorted(one for part in parts for one in part) == whole
    for index, count in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="count from 0"):
            Share(index, count)
