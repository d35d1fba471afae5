"""Damage to every kind of file that a later stage reads: it is named, never used, and repaired.

A repaired run must end with the weights and scores of an undisturbed one.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from command_line import small_profile_data
from engine_runs import config_for, run_to, trained_weights, trainer_for
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks.evaluation.scoring.journal import Entry, Journal
from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.policy import load_policy
from g2rpo.policy.folder import resolve_source
from g2rpo.training.checkpoint.folder import (
    checkpoint_folder,
    latest_checkpoint,
    prune,
    saved_iterations,
)
from g2rpo.training.checkpoint.load import export_trained, load_trained
from g2rpo.training.config import CheckpointConfig
from reproduce.cli import app
from reproduce.experiment import Experiment, Profile, ResolvedCell, expand
from reproduce.experiment.layout import Layout
from reproduce.runs.listing import read_run_state
from reproduce.stages.base import Stage, perform
from reproduce.stages.cells import Sample, Score
from reproduce.stages.embedding import Embed
from reproduce.stages.training import Credit, Train
from slurm.distributed import Ranks

EXPERIMENT: dict[str, Any] = {
    "name": "t",
    "cells": {"hps/mix_grpo": {"method": "mix_grpo", "train": ["hps"]}},
    "table": {"title": "A table", "columns": ["hps"]},
}
CREDIT = {"samples": 4, "repeats": 3, "rollouts": 1}


def flip(path: Path) -> None:
    """One bit, somewhere."""
    data = bytearray(path.read_bytes())
    # Not of white space around JSON, whose meaning one bit may leave as it is.
    places = [place for place, byte in enumerate(data) if byte not in b" \n"]
    data[random.Random(path.name).choice(places)] ^= 1
    path.write_bytes(bytes(data))


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS: dict[str, Callable[[Path], None]] = {
    "a bit": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "a folder": to_folder,
}
RUN = {
    "weights": "checkpoints/iteration-000002/transformer/*.safetensors",
    "weights' configuration": "checkpoints/iteration-000002/transformer/config.json",
    "optimizer": "checkpoints/iteration-000002/optimizer.safetensors",
    "metrics of a checkpoint": "checkpoints/iteration-000002/metrics.jsonl",
    "state": "checkpoints/iteration-000002/state.json",
    "metrics": "metrics.jsonl",
    "settings": "config.json",
    "manifest": "manifest.json",
    "scores": "evaluations/*/scores.parquet",
    "diversity": "evaluations/*/diversity.parquet",
    "drift": "evaluations/*/drift.parquet",
    "scores of previews": "evaluations/*/pictures/iteration-000001.parquet",
    "image": "evaluations/*/images/000001.png",
    "further image": "evaluations/*/diversity/000000_1.png",
    "evaluation's manifest": "evaluations/*/manifest.json",
}
"""Files of a finished run."""
SAMPLED = {
    "images/000002.png": "a bit",
    "diversity/000001_1.png": "emptied",
    "drift.parquet": "a folder",
    "shares/*-images.json": "missing",
}
"""Files of an evaluation that has been sampled and not scored, each with a fault."""
CASES = [(kind, list(FAULTS)[place % len(FAULTS)]) for place, kind in enumerate(RUN)]


@dataclass(frozen=True)
class Site:
    """One cell and where its runs are."""

    cell: ResolvedCell
    runs: Path

    @property
    def layout(self) -> Layout:
        return Layout(self.runs, self.runs)

    @property
    def run(self) -> Path:
        return self.layout.training(self.cell)

    @property
    def evaluation(self) -> Path:
        return self.layout.evaluation(self.cell)

    def stage(self, kind: str) -> Stage:
        classes = {stage.kind: stage for stage in (Train, Sample, Score)}
        return classes[kind](self.layout, self.cell)

    def do(self, *kinds: str) -> None:
        for kind in kinds:
            perform(self.stage(kind), Ranks())

    def copy(self, to: Path) -> "Site":
        shutil.copytree(self.runs, to / "runs")
        return Site(self.cell, to / "runs")

    def weights(self) -> dict[str, torch.Tensor]:
        folder = self.run / "checkpoints" / "iteration-000002" / "transformer"
        return load_file(folder / "diffusion_pytorch_model.safetensors")

    def same_as(self, other: "Site") -> None:
        mine, theirs = self.weights(), other.weights()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        for name in ("scores", "diversity", "drift"):
            frames = [pd.read_parquet(one.evaluation / f"{name}.parquet") for one in (self, other)]
            pd.testing.assert_frame_equal(*frames, check_exact=True)
        assert all(self.stage(kind).is_done() for kind in ("train", "sample", "score"))
        assert read_run_state(self.run).word == "done"


@pytest.fixture(scope="module")
def profile(smoke_assets: Path) -> Profile:
    data = small_profile_data(smoke_assets)
    data["rewards"] = {name: data["rewards"][name] for name in ("hps", "clip")}
    data["evaluation"]["limit"] = 4
    data["keep_images"] = 2
    return validate(Profile, data, "smoke")


@pytest.fixture(scope="module")
def sampled(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Site:
    (cell,) = expand(validate(Experiment, EXPERIMENT, "test"), profile, (1,))
    site = Site(cell, tmp_path_factory.mktemp("sampled") / "runs")
    site.do("train", "sample")
    return site


@pytest.fixture(scope="module")
def whole(sampled: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = sampled.copy(tmp_path_factory.mktemp("whole"))
    site.do("score")
    site.same_as(site)
    return site


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


@pytest.mark.parametrize(("kind", "fault"), CASES)
def test_a_finished_run_is_repaired(
    whole: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, fault: str
) -> None:
    site = whole.copy(tmp_path)
    path = only(site.run, RUN[kind])
    FAULTS[fault](path)
    state = read_run_state(site.run)
    if path.parent == site.evaluation and fault == "missing" and kind.endswith("manifest"):
        assert "unfinished" in state.evaluations
    elif kind == "manifest" and fault == "missing":
        assert state.word == "interrupted"
    else:
        assert state.word == "interrupted"
        assert str(path.relative_to(site.run)) in state.reason and "\n" not in state.reason
    assert not all(site.stage(one).is_done() for one in ("train", "score"))
    site.do("train", "sample", "score")
    assert fault == "missing" or path.name in caplog.text
    site.same_as(whole)


def test_what_was_sampled_is_repaired_before_it_is_scored(
    whole: Site, sampled: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = sampled.copy(tmp_path)
    for pattern, fault in SAMPLED.items():
        path = only(site.evaluation, pattern)
        FAULTS[fault](path)
        assert not site.stage("sample").is_done()
        with pytest.raises(UserError, match="run `g2rpo sample` on this cell"):
            site.do("score")
        site.do("sample")
        assert fault == "missing" or path.name in caplog.text
    site.do("score")
    site.same_as(whole)


@pytest.mark.parametrize("parts", [("checkpoints",), ("evaluations/*/images", "images")])
def test_a_folder_of_a_run_may_be_gone(whole: Site, tmp_path: Path, parts: tuple[str, ...]) -> None:
    site = whole.copy(tmp_path)
    for part in parts:
        shutil.rmtree(only(site.run, part))
    if "checkpoints" in parts:  # scores do not need the weights
        assert site.stage("score").is_done() and not site.stage("train").is_done()
    site.do("train", "sample", "score")
    site.same_as(whole)


def test_any_bit_of_a_document_counts(whole: Site) -> None:
    """A flipped bit in a number or a key is noticed as well as one that breaks the JSON."""
    for path in (whole.run / "manifest.json", whole.evaluation / "manifest.json"):
        kept = path.read_bytes()
        places = [place for place, byte in enumerate(kept) if byte not in b" \n"]
        for place in random.Random(0).sample(places, 40):
            data = bytearray(kept)
            data[place] ^= 1 << random.Random(place).randrange(7)
            path.write_bytes(bytes(data))
            found = read_run_state(whole.run)
            assert found.word == "interrupted", (path.name, place)
            assert path.name in found.reason
        path.write_bytes(kept)
    assert read_run_state(whole.run).word == "done"


def test_the_commands_name_what_repairs(whole: Site, tmp_path: Path, profile: Profile) -> None:
    site = whole.copy(tmp_path)
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    data = json.loads(profile.model_dump_json(exclude_unset=True))
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(data))
    shutil.rmtree(site.evaluation)
    flip(only(site.run, RUN["weights"]))
    cell = [str(tmp_path / "t.yaml"), "hps/mix_grpo", "--profile", str(tmp_path / "p.yaml")]
    where = ["--results", str(tmp_path)]
    refused = CliRunner().invoke(app, ["sample", *cell, *where])
    assert isinstance(refused.exception, UserError)
    assert "run `g2rpo train` on this cell" in str(refused.exception)
    refused = CliRunner().invoke(app, ["export", str(site.run), "-o", str(tmp_path / "out")])
    assert isinstance(refused.exception, UserError)
    assert "safetensors does not match its recorded SHA-256" in str(refused.exception)
    shown = CliRunner().invoke(app, ["runs", *where])
    assert shown.exit_code == 0 and "does not match its recorded SHA-256" in shown.stdout
    for verb in ("train", "sample"):
        assert CliRunner().invoke(app, [verb, *cell, *where]).exit_code == 0
    site.do("score")
    site.same_as(whole)


def test_damaged_previews_are_left_out(
    whole: Site, sampled: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = sampled.copy(tmp_path)
    flip(site.run / "images" / "iteration-000001" / "000001.png")
    site.do("score")
    assert "000001.png" in caplog.text and "skipping it" in caplog.text
    name = "pictures/iteration-000001.parquet"
    before = pd.read_parquet(whole.evaluation / name)
    scored = pd.read_parquet(site.evaluation / name)
    assert set(before["prompt_id"]) - set(scored["prompt_id"]) == {"000001"}
    site.same_as(whole)


def test_a_damaged_reference_of_the_drift_is_made_again(
    whole: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = whole.copy(tmp_path)
    path = only(site.runs, "base-*/drift/*.safetensors")
    flip(path)
    (site.evaluation / "drift.parquet").unlink()
    site.do("sample", "score")
    assert path.name in caplog.text
    site.same_as(whole)


def test_a_damaged_line_of_a_journal_is_scored_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, "judge", 0)
    entries = [Entry(f"{item}", "key", {"hps": 0.1 * item}) for item in range(3)]
    journal.append(entries)
    kept = journal.path.read_bytes()
    second = kept.index(b"\n") + 1
    for place in range(second, kept.index(b"\n", second)):
        data = bytearray(kept)
        data[place] ^= 1
        journal.path.write_bytes(bytes(data))
        found = list(journal.read())
        assert found in ([entries[0], entries[2]], entries)  # white space may be another
        assert found == entries or "a damaged line" in caplog.text
    assert found == [entries[0], entries[2]]


def test_embeddings_are_repaired(
    whole: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = Layout(tmp_path / "runs", tmp_path / "runs")
    perform(Embed(layout, (whole.cell,)), Ranks())
    files = (layout.runs / "embeddings").glob("*/*.safetensors")
    before = {path: path.read_bytes() for path in files}
    path = min(before)
    for fault, damage in FAULTS.items():
        damage(path)
        again = Embed(layout, (whole.cell,))
        assert not again.is_done()
        perform(again, Ranks())
        assert again.is_done()
        assert fault == "missing" or path.stem in caplog.text
        assert {one: one.read_bytes() for one in before} == before


@pytest.mark.parametrize(
    ("name", "fault"), [("rollout-000000.json", "a bit"), ("manifest.json", "emptied")]
)
def test_credit_is_measured_again(
    whole: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, fault: str
) -> None:
    from benchmarks.evaluation.protocol import CreditConfig

    layout = Layout(tmp_path, tmp_path)
    credit = CreditConfig.model_validate(CREDIT)
    stage = Credit(layout, whole.cell.model_copy(update={"credit": credit}))
    perform(stage, Ranks())
    rollouts = json.loads((stage.folder / "manifest.json").read_text())["rollouts"]
    FAULTS[fault](stage.folder / name)
    assert not stage.is_done()
    perform(stage, Ranks())
    assert stage.is_done()
    assert fault == "missing" or name in caplog.text
    assert json.loads((stage.folder / "manifest.json").read_text())["rollouts"] == rollouts


@pytest.mark.parametrize("changes", [
    {"execution": {"sharding": "fsdp2"}}, {"optimization": {"ema_decay": 0.5}},
])  # fmt: skip
def test_every_file_of_a_checkpoint_is_compared_before_it_is_used(
    smoke_assets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    config = config_for(smoke_assets, policy={"max_sequence_length": 16}, **changes)
    run = tmp_path / "run"
    trainer = trainer_for(config, run)
    run_to(trainer, 1)
    run_to(trainer, 2)
    (run / "metrics.jsonl").write_text("")
    run_to(trainer, 3)
    expected = trained_weights(trainer)
    newest = checkpoint_folder(run, 3)
    files = [path for path in newest.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    if "execution" in changes:
        assert ".metadata" in names and any(name.endswith(".distcp") for name in names)
    untouched = load_policy(config.policy, "cpu")
    for path in files:
        kept = path.read_bytes()
        if not kept:
            continue
        for fault in FAULTS.values():
            fault(path)
            caplog.clear()
            assert latest_checkpoint(run) == checkpoint_folder(run, 2), path.name
            assert path.name in caplog.text and len(caplog.records) == 1
            with pytest.raises(UserError, match=r"iteration-000003: .*train this cell again"):
                load_trained(untouched, run)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.write_bytes(kept)
    assert latest_checkpoint(run) == newest
    flip(files[0] if files[0].stat().st_size else files[1])
    resumed = trainer_for(config, run)
    assert resumed.progress.iteration == 2
    run_to(resumed, 3)
    again = trained_weights(resumed)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    for iteration in saved_iterations(run):
        flip(checkpoint_folder(run, iteration) / "state.json")
    caplog.clear()
    assert latest_checkpoint(run) is None and "training starts over" in caplog.text


def test_two_checkpoints_are_kept_and_damaged_later_ones_go(
    smoke_assets: Path, tmp_path: Path
) -> None:
    config = config_for(
        smoke_assets,
        optimization={"iterations": 3},
        checkpoints={"every": 1, "keep_last": 1},
        execution={"sharding": "fsdp2"},
    )
    trainer_for(config, tmp_path).train()
    assert saved_iterations(tmp_path) == [2, 3]
    checkpoint_folder(tmp_path, 3).rename(checkpoint_folder(tmp_path, 9))
    prune(tmp_path, CheckpointConfig(), newest=2)
    assert saved_iterations(tmp_path) == [2]


def test_checkpoints_of_older_versions_are_read(smoke_assets: Path, tmp_path: Path) -> None:
    """They recorded the sizes of their files alone."""
    trainer = trainer_for(config_for(smoke_assets), tmp_path)
    run_to(trainer, 1)
    folder = checkpoint_folder(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    sizes = {name: entry["size"] for name, entry in state["files"].items()}
    (folder / "state.json").write_text(json.dumps({"progress": state["progress"], "files": sizes}))
    assert latest_checkpoint(tmp_path) == folder
    assert trainer_for(config_for(smoke_assets), tmp_path).progress.iteration == 1
    (folder / "optimizer.safetensors").write_bytes(b"")
    assert latest_checkpoint(tmp_path) is None


def test_a_pickle_without_a_checksum_is_not_loaded(
    smoke_assets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(smoke_assets, execution={"sharding": "fsdp2"})
    run_to(trainer_for(config, tmp_path), 1)
    folder = checkpoint_folder(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    sizes = {name: entry["size"] for name, entry in state["files"].items()}
    (folder / "state.json").write_text(json.dumps({"progress": state["progress"], "files": sizes}))
    assert latest_checkpoint(tmp_path) is None
    assert "shards/.metadata has no recorded SHA-256" in caplog.text


def test_damaged_exports_are_refused_by_name(smoke_assets: Path, tmp_path: Path) -> None:
    config = config_for(smoke_assets)
    run_to(trainer_for(config, tmp_path / "run"), 1)
    (tmp_path / "run" / "config.json").write_text(config.model_dump_json())
    export_trained(tmp_path / "run", tmp_path / "out")
    assert resolve_source(str(tmp_path / "out"), None) == tmp_path / "out"
    path = tmp_path / "out" / "transformer" / "config.json"
    kept = path.read_bytes()
    for damage in FAULTS.values():
        damage(path)
        with pytest.raises(UserError, match=r"config\.json"):
            resolve_source(str(tmp_path / "out"), None)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(kept)
