"""Encoding prompts once: the command, what counts as encoded, and that results do not change."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from command_line import g2rpo_here, write_small_profile
from safetensors.torch import load_file

from g2rpo.config import parse_overrides
from g2rpo.data.prompts import prompts_of_iteration, read_prompts
from g2rpo.flow.schedule import build_grid
from g2rpo.policy import Policy, load_policy
from g2rpo.policy.size import model_size
from g2rpo.sampling import sample_latents
from g2rpo.training.loop import Trainer
from g2rpo.training.metrics import read_metrics
from reproduce.experiment import (
    ResolvedCell,
    expand,
    load_experiment,
    load_profile,
    resolve,
)
from reproduce.experiment.layout import Layout
from reproduce.stages import embedding


@pytest.fixture(scope="module")
def profile(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_profile(tmp_path_factory.mktemp("profile") / "small.yaml", smoke_assets)


def cell_of(profile: Path, key: str = "hps/g2rpo", *overrides: str, seed: int = 1) -> ResolvedCell:
    changes = parse_overrides(overrides)
    return resolve(load_experiment("table1"), load_profile(str(profile)), key, seed, changes)


def layout_of(results: Path) -> Layout:
    return Layout(results / "runs", results / "runs")


def embed(profile: Path, results: Path) -> int:
    where = ("--profile", str(profile), "--results", str(results))
    return g2rpo_here(results, "embed", "table1", *where)


def states(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [*folder.glob("*.safetensors"), *folder.glob("*.json")]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def embedded(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with the embeddings of table1 and nothing else."""
    results = tmp_path_factory.mktemp("embedded")
    assert embed(profile, results) == 0
    return results


def test_the_command_encodes_once_what_every_cell_reads(
    profile: Path, embedded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = expand(load_experiment("table1"), load_profile(str(profile)), [1])
    layout = layout_of(embedded)
    assert len(cells) > 5 and all(embedding.is_embedded(cell, layout) for cell in cells)
    assert not embedding.is_embedded(cells[0], layout_of(embedded / "elsewhere"))

    (folder,) = (path for path in (embedded / "runs" / "embeddings").iterdir() if path.is_dir())
    described = json.loads(folder.with_suffix(".json").read_text())
    assert described["max_sequence_length"] == 24 and described["dtype"] == "float32"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    ((policy, texts),) = embedding.prompts_by_policy(cells)
    # The estimate leaves out the header, which holds the prompts and their hashes.
    header = 1000 + sum(len(text) + 80 for text in texts)
    assert 0 <= size - model_size(policy).embedding_bytes(policy) * len(texts) < header

    before = states(folder)
    assert embed(profile, embedded) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == [str(folder)] and "embed prompts" not in printed.err
    assert states(folder) == before


def test_the_prompts_of_a_cell_are_those_that_its_stages_encode(
    profile: Path, tmp_path: Path
) -> None:
    cell = cell_of(profile, "hps/g2rpo", "optimization.iterations=3")
    assert cell.train is not None and cell.train.validation is not None
    drawn = [
        prompt.text
        for iteration in range(3)
        for prompt in prompts_of_iteration(
            read_prompts(Path(cell.train.prompts.file)), 2, 1, iteration
        )
    ]
    validation = read_prompts(Path(cell.train.validation.file), 4)
    test = read_prompts(Path(cell.evaluation_prompts), 8)
    expected = {*drawn, *(prompt.text for prompt in (*validation, *test))}
    ((policy, texts),) = embedding.prompts_by_policy([cell, cell])
    assert set(texts) == expected and len(texts) == len(expected)
    assert policy.source == cell.policy.source


def test_changed_prompts_and_settings_are_not_embedded(
    profile: Path, embedded: Path, tmp_path: Path
) -> None:
    layout = layout_of(embedded)
    assert embedding.is_embedded(cell_of(profile), layout)
    assert not embedding.is_embedded(cell_of(profile, seed=5), layout)
    assert not embedding.is_embedded(
        cell_of(profile, "hps/g2rpo", "policy.max_sequence_length=16"), layout
    )
    data = yaml.safe_load(profile.read_text())
    prompts = tmp_path / "test.txt"
    prompts.write_text(Path(data["prompts"]["test"]).read_text())
    data["prompts"]["test"] = str(prompts)
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(data))
    cell = cell_of(changed)
    assert embedding.is_embedded(cell, layout)  # the same prompts in another file
    prompts.write_text("another prompt\n" + prompts.read_text())
    assert not embedding.is_embedded(cell, layout)


class Zeros:
    """A source whose embeddings are wrong."""

    def read(self, prompts: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        row = {"prompt_embeds": torch.zeros(24, 32), "pooled_prompt_embeds": torch.zeros(32)}
        return dict.fromkeys(prompts, row)


def test_training_from_the_cache_gives_the_same_bits(
    profile: Path, embedded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cell = cell_of(
        profile, "hps/g2rpo", "execution.device=cpu", "optimization.learning_rate=1.0e-3"
    )
    assert cell.train is not None and cell.train.optimization.iterations == 2
    policies: dict[str, Policy] = {}
    for name in ("encoded", "cached", "control"):
        run = tmp_path / name
        run.mkdir()
        trainer = Trainer(cell.train, run)
        if name == "cached":
            embedding.attach(trainer.policy, layout_of(embedded))
        elif name == "control":
            trainer.policy.conditioning_source = Zeros()
        with caplog.at_level(logging.WARNING, logger="g2rpo"):
            trainer.train()
        policies[name] = trainer.policy
    assert policies["encoded"].text_encoders is not None
    assert policies["cached"].text_encoders is None  # never in memory
    assert not caplog.records

    def weights(name: str) -> dict[str, torch.Tensor]:
        (file,) = (tmp_path / name).glob("checkpoints/*2/transformer/*.safetensors")
        return load_file(file)

    encoded, cached, control = weights("encoded"), weights("cached"), weights("control")
    assert all(torch.equal(encoded[name], cached[name]) for name in encoded)
    assert not all(torch.equal(encoded[name], control[name]) for name in encoded)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("encoded", "cached")]
    for one, two in zip(*rows, strict=True):
        for key in one:
            if key.startswith(("reward/", "validation/", "loss", "gradient")):
                assert one[key] == two[key]

    prompts = read_prompts(Path(cell.evaluation_prompts), 3)
    latents = []
    for name in ("encoded", "cached"):
        grid = build_grid(cell.evaluation.grid, policies[name].image_tokens)
        latents.append(sample_latents(policies[name], prompts, grid, seed=1))
    assert torch.equal(*latents)


def test_a_policy_without_a_cache_is_left_as_it_is(profile: Path, tmp_path: Path) -> None:
    policy = load_policy(cell_of(profile).policy, "cpu")
    embedding.attach(policy, layout_of(tmp_path))
    assert policy.conditioning_source is None
