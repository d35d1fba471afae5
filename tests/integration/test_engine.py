"""The training engine on one and two CPU ranks: sharded, with masters, with adapters."""

import json
import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from engine_runs import (
    config_for,
    exhausted_memory,
    find,
    gradient_of,
    leg_config,
    off_policy,
    relative,
    rolled_out,
    run_to,
    trained_weights,
    trainer_for,
    whole,
)
from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.files import write_json
from g2rpo.policy import load_policy
from g2rpo.training.checkpoint.folder import checkpoint_folder, latest_checkpoint
from g2rpo.training.checkpoint.load import export_trained, load_trained
from g2rpo.training.loop import Trainer
from g2rpo.training.weights import build_weights

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def findings(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks found, in one process each."""
    folder = tmp_path_factory.mktemp("ranks")
    scenarios = (
        "gradients", "lifecycle", "out_of_memory", "first_leg", "replicated", "equal_groups",
    )  # fmt: skip
    assert find(smoke_assets, folder, *scenarios) == 0
    return folder


def found(findings: Path, scenario: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((findings / f"{scenario}.json").read_text())
    return read


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_sharded_loss_and_gradients_are_those_of_plain_float32(
    findings: Path, dtype: str, tolerance: float
) -> None:
    everything = found(findings, "gradients")
    plain, sharded = everything["plain"], everything[dtype]
    held = [torch.load(findings / "gradients" / f"{name}.pt") for name in (dtype, "plain")]
    assert relative(held[0], held[1], None) < tolerance
    assert sharded["norm"] == pytest.approx(plain["norm"], rel=tolerance)
    # Advantages sum to 0, so the loss is small against its parts, which are about 1.
    assert sharded["loss"] == pytest.approx(plain["loss"], abs=tolerance)
    assert sharded["ratio"] <= 2e-5


@pytest.mark.parametrize("lora", [None, LORA])
def test_bfloat16_with_masters_has_the_gradient_of_float32_and_a_ratio_of_one(
    smoke_assets: Path, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    trainers = {
        dtype: trainer_for(
            off_policy(smoke_assets, policy={"dtype": dtype}, lora=lora), tmp_path / dtype
        )
        for dtype in ("float32", "bfloat16")
    }
    work = rolled_out(trainers["float32"])
    for dtype, trainer in trainers.items():
        gradient_of(trainer, work, tmp_path / f"{dtype}.pt")
    plain, narrow = (torch.load(tmp_path / f"{dtype}.pt") for dtype in trainers)
    assert relative(narrow, plain, None) < 3e-2
    config = config_for(smoke_assets, policy={"dtype": "bfloat16"}, lora=lora)
    assert trainer_for(config, tmp_path / "ratio").iterate()["ratio_deviation"] <= 2e-5


def test_masters_keep_steps_that_bfloat16_would_lose(smoke_assets: Path, tmp_path: Path) -> None:
    config = config_for(
        smoke_assets, policy={"dtype": "bfloat16"}, optimization={"learning_rate": 1e-6}
    )
    trainer = trainer_for(config, tmp_path)
    before = trained_weights(trainer)
    trainer.iterate()
    computed = dict(trainer.policy.transformer.named_parameters())
    for name, master in trainer.weights.named:
        assert computed[name].dtype == torch.bfloat16
        assert torch.equal(computed[name], master.to(torch.bfloat16))
    moved = relative(trained_weights(trainer), before, None)
    assert 0 < moved < 1e-4


def test_sharded_runs_resume_bit_for_bit_and_validate_together(
    smoke_assets: Path, findings: Path, tmp_path: Path
) -> None:
    lifecycle = found(findings, "lifecycle")
    assert lifecycle["same"] == [True, True, True, True]
    assert lifecycle["same_average"]
    config = config_for(
        smoke_assets,
        policy={"dtype": "bfloat16"},
        validation={"file": str(smoke_assets / "prompts" / "test.txt"), "limit": 5},
    )
    alone = trainer_for(config, tmp_path).validate()
    assert lifecycle["validation"] == pytest.approx(alone, abs=1e-3)


@pytest.fixture(scope="module")
def later(smoke_assets: Path, findings: Path) -> Path:
    """Where one rank went on with what two had begun, two went on again, and memory ran out."""
    middle = trainer_for(leg_config(smoke_assets), findings / "legs")
    assert middle.progress.iteration == 1
    run_to(middle, 2)
    assert find(smoke_assets, findings, "last_leg", "out_of_memory_sharded") != 0
    return findings


@dataclass
class Alone:
    """One rank's training of three iterations."""

    start: dict[str, Tensor]
    trainer: Trainer
    rows: list[dict[str, Any]]


def train_alone(assets: Path, run: Path, seed: int) -> Alone:
    trainer = trainer_for(leg_config(assets).model_copy(update={"seed": seed}), run)
    start = trained_weights(trainer)
    return Alone(start, trainer, [trainer.iterate() for _ in range(3)])


@pytest.fixture(scope="module")
def alone(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return train_alone(
        smoke_assets, tmp_path_factory.mktemp("alone"), leg_config(smoke_assets).seed
    )


def test_two_then_one_then_two_ranks_train_as_one_does(
    smoke_assets: Path, later: Path, alone: Alone, tmp_path: Path
) -> None:
    assert found(later, "last_leg") == {"begun": 2, "done": 3}
    ended, single = trainer_for(leg_config(smoke_assets), later / "legs"), alone.trainer
    assert replace(ended.progress, device_seconds=0) == replace(single.progress, device_seconds=0)
    weights = trained_weights(single)
    assert relative(trained_weights(ended), weights, alone.start) < 1e-6
    assert ended.ema is not None and single.ema is not None
    for mine, theirs in zip(ended.ema.shadow_params, single.ema.shadow_params, strict=True):
        assert torch.allclose(whole(mine), whole(theirs), atol=1e-9)
    # The control: a run with another seed must not pass for the same.
    control = train_alone(smoke_assets, tmp_path / "control", seed=4).trainer
    assert relative(trained_weights(control), weights, alone.start) > 1e-2


def test_two_replicated_ranks_train_as_one_does(
    smoke_assets: Path, findings: Path, alone: Alone
) -> None:
    config = leg_config(smoke_assets, "replicated")
    ended = trainer_for(config, findings / "replicated" / "run")
    assert relative(trained_weights(ended), trained_weights(alone.trainer), alone.start) < 1e-6
    for two, one in zip(found(findings, "replicated")["rows"], alone.rows, strict=True):
        assert one.keys() == two.keys()
        for key in ("rollout_evaluations", "training_backwards", "images_scored"):
            assert two[key] == one[key]
        for key in (key for key in one if key.startswith("reward/")):
            assert two[key] == pytest.approx(one[key], abs=1e-3)


def test_equal_groups_are_counted_over_all_ranks(findings: Path) -> None:
    for first, second in found(findings, "equal_groups").values():
        assert first == second
        assert first[0] == 3 * 4  # three prompts; two steps and two granularities


def test_the_average_of_weights_warms_up_as_released(smoke_assets: Path, tmp_path: Path) -> None:
    config = config_for(smoke_assets, optimization={"ema_decay": 0.2})
    trainer = trainer_for(config, tmp_path)
    expected = trained_weights(trainer)
    for n in (1, 2, 3):
        trainer.iterate()
        decay = min((1 + n) / (10 + n), 0.2)
        for name, weight in trained_weights(trainer).items():
            expected[name] = decay * expected[name] + (1 - decay) * weight
    assert trainer.ema is not None
    for average, wanted in zip(trainer.ema.shadow_params, expected.values(), strict=True):
        assert torch.allclose(whole(average), wanted, atol=1e-6)


def test_memory_that_runs_out_on_one_rank_halves_the_micro_batch_of_all(findings: Path) -> None:
    result = found(findings, "out_of_memory")
    enough, short = result["rows"]
    assert "training_micro_batch" not in enough
    assert short["training_micro_batch"] == 2
    for key in ("training_forwards", "training_backwards", "rollout_evaluations"):
        assert short[key] == enough[key]  # nothing is counted twice
    assert short["loss"] == pytest.approx(enough["loss"], abs=1e-6)
    assert result["away"] < 1e-3
    assert result["resumed_with"] == 2


def test_memory_that_runs_out_on_a_sharded_rank_ends_the_run_to_be_resumed(
    smoke_assets: Path, later: Path
) -> None:
    execution = {"sharding": "fsdp2", "training_micro_batch": 4}
    config = config_for(smoke_assets, execution=execution)
    resumed = trainer_for(config, later / "out_of_memory_sharded" / "run")
    assert resumed.progress.iteration == 1
    assert resumed.sizes.training.states == 2


def test_memory_that_runs_out_warns_once_and_ends_at_a_single_state(
    smoke_assets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(smoke_assets, execution={"training_micro_batch": 8})
    trainer = trainer_for(config, tmp_path)
    with caplog.at_level(logging.WARNING), exhausted_memory(trainer.policy, 4):
        trainer.iterate()
        trainer.iterate()
    warnings = [record for record in caplog.records if "out of memory" in record.message]
    assert len(warnings) == 1
    before = trained_weights(trainer)
    with (
        exhausted_memory(trainer.policy, 0),
        pytest.raises(UserError, match=r"one state at a time.*gradient_checkpointing.*lora"),
    ):
        trainer.iterate()
    after = trained_weights(trainer)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_run_resumes_bit_for_bit_and_keeps_its_base(
    smoke_assets: Path, tmp_path: Path, dtype: str
) -> None:
    config = config_for(
        smoke_assets,
        policy={"dtype": dtype},
        lora=LORA,
        optimization={"ema_decay": 0.5, "kl_coefficient": 0.5},
    )
    trainer = trainer_for(config, tmp_path / "run")
    base = load_policy(config.policy, "cpu").transformer.state_dict()
    run_to(trainer, 2)
    resumed = trainer_for(config, tmp_path / "run")
    assert resumed.progress.iteration == 2
    rows = [one.iterate() for one in (trainer, resumed)]
    assert rows[0]["kl"] == rows[1]["kl"] > 0
    weights = [trained_weights(one) for one in (trainer, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(".lora_" in name for name in weights[0])
    for name, value in trainer.policy.transformer.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")])
    saved = {path.name for path in checkpoint_folder(tmp_path / "run", 2).iterdir()}
    assert saved == {"lora", "ema_lora", "optimizer.safetensors", "ema.safetensors", "state.json"}


def test_a_checkpoint_holds_what_was_when_it_was_begun(smoke_assets: Path, tmp_path: Path) -> None:
    trainer = trainer_for(config_for(smoke_assets, execution={"sharding": "fsdp2"}), tmp_path)
    trainer.iterate()
    before = trained_weights(trainer)
    trainer.save()
    assert latest_checkpoint(tmp_path) is None  # not before it is whole
    for parameter in trainer.weights.parameters:
        parameter.data.add_(1.0)
    trainer.checkpoints.finish()
    resumed = trainer_for(trainer.config, tmp_path)
    assert resumed.progress.iteration == 1
    after = trained_weights(resumed)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_half_written_sharded_checkpoint_is_never_read(
    smoke_assets: Path, tmp_path: Path
) -> None:
    config = config_for(smoke_assets, execution={"sharding": "fsdp2"})
    trainer = trainer_for(config, tmp_path)
    run_to(trainer, 1)
    trainer.iterate()
    trainer.save()
    while not trainer.checkpoints.written:
        time.sleep(0.01)
    # Killed here: the files are written, but the checkpoint is not published.
    torn = checkpoint_folder(tmp_path, 3)
    shutil.copytree(checkpoint_folder(tmp_path, 1), torn)
    part = next((torn / "shards").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-100])
    assert trainer_for(config, tmp_path).progress.iteration == 1
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_run_can_change_between_whole_and_sharded_checkpoints(
    smoke_assets: Path, tmp_path: Path
) -> None:
    kinds = ("replicated", "fsdp2", "replicated")
    for number, kind in enumerate(kinds, start=1):
        config = config_for(
            smoke_assets, optimization={"ema_decay": 0.5}, execution={"sharding": kind}
        )
        trainer = trainer_for(config, tmp_path / "changing")
        assert trainer.progress.iteration == number - 1
        run_to(trainer, number)
    straight = trainer_for(config, tmp_path / "straight")
    run_to(straight, 3)
    weights = [trained_weights(one) for one in (trainer, straight)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("changes", [
    {},
    {"execution": {"sharding": "fsdp2"}},
    {"optimization": {"ema_decay": 0.5}, "execution": {"sharding": "fsdp2"}},
    {"optimization": {"ema_decay": 0.5}},
    {"lora": LORA, "optimization": {"ema_decay": 0.5}},
])  # fmt: skip
def test_trained_weights_are_loaded_and_exported_whatever_they_were_saved_as(
    smoke_assets: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_for(smoke_assets, policy={"max_sequence_length": 16}, **changes)
    run = tmp_path / "run"
    trainer = trainer_for(config, run)
    run_to(trainer, 2)
    settings = config.model_dump(mode="json") | {"continuations": None}  # an older version's key
    write_json(run / "config.json", settings)
    if trainer.ema is not None:
        trainer.ema.copy_to(trainer.weights.parameters)

    fresh = load_policy(config.policy, "cpu")
    assert load_trained(fresh, run) == latest_checkpoint(run)
    expected = trainer.policy.transformer.state_dict()
    for name, value in fresh.transformer.state_dict().items():
        assert torch.equal(value, expected[name])

    output = tmp_path / "exported"
    said = export_trained(run, output)
    if "lora" in changes:
        assert said == "LoRA file of iteration-000002"
        pipeline = FluxPipeline.from_pretrained(smoke_assets / "policy")
        pipeline.load_lora_weights(output, weight_name="pytorch_lora_weights.safetensors")
        for name, parameter in pipeline.transformer.named_parameters():
            if ".lora_" in name:
                saved = expected[name.replace("default_0", "default")]
                assert torch.equal(parameter, saved)
    else:
        assert said == "FluxPipeline folder of iteration-000002"
        pipeline = FluxPipeline.from_pretrained(output)
        for name, value in pipeline.transformer.state_dict().items():
            assert torch.equal(value, expected[name])


def test_impossible_settings_are_rejected_in_one_line(smoke_assets: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        load_trained(load_policy(config_for(smoke_assets).policy, "cpu"), tmp_path)
    with pytest.raises(ValueError, match="not supported with lora"):
        config_for(smoke_assets, lora=LORA, execution={"sharding": "fsdp2"})
    if not _has_torchao():
        packed = config_for(smoke_assets, optimization={"optimizer": "adamw_8bit"})
        with pytest.raises(UserError, match="pip install torchao"):
            trainer_for(packed, tmp_path)


def _has_torchao() -> bool:
    from importlib.util import find_spec

    return find_spec("torchao") is not None


@pytest.mark.skipif(not _has_torchao(), reason="8-bit optimiser states need torchao")
@pytest.mark.parametrize("sharding", ["replicated", "fsdp2"])
def test_eight_bit_states_train_and_resume(
    smoke_assets: Path, tmp_path: Path, sharding: str
) -> None:
    runs = []
    for optimizer in ("adamw", "adamw_8bit"):
        config = config_for(
            smoke_assets,
            optimization={"optimizer": optimizer},
            execution={"sharding": sharding},
        )
        runs.append(trainer_for(config, tmp_path / optimizer))
        run_to(runs[-1], 2)
    packed = runs[1]
    start = {n: whole(p) for n, p in build_weights(packed.config, packed.accelerator).named}
    weights = [trained_weights(one) for one in runs]
    assert 0 < relative(weights[1], weights[0], start) < 0.2
    resumed = trainer_for(packed.config, tmp_path / "adamw_8bit")
    run_to(packed, 3)
    run_to(resumed, 3)
    weights = [trained_weights(one) for one in (packed, resumed)]
    assert relative(weights[1], weights[0], start) < 0.02  # what is packed again is rounded again


def test_gradient_checkpointing_changes_nothing(smoke_assets: Path, tmp_path: Path) -> None:
    weights = []
    for checkpointed in (False, True):
        config = config_for(smoke_assets, execution={"gradient_checkpointing": checkpointed})
        trainer = trainer_for(config, tmp_path / str(checkpointed))
        trainer.iterate()
        weights.append(trained_weights(trainer))
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
