"""Rollouts that run out of memory, on one rank and on one of two; compiled blocks on two."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import config_for, exhausted_memory, find, trainer_for
from torch import Tensor

from g2rpo.batching import BatchSize
from g2rpo.errors import UserError
from g2rpo.policy.decoding import decode_size
from g2rpo.training.batch_sizes import LARGEST, fitting_states, state_bytes


@pytest.fixture(scope="module")
def findings(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks found, in one process each."""
    folder = tmp_path_factory.mktemp("ranks")
    assert find(smoke_assets, folder, "short_rollout", "compiled") == 0
    return folder


def test_one_rank_of_two_that_runs_out_halves_the_size_of_both(findings: Path) -> None:
    for found in json.loads((findings / "short_rollout.json").read_text())["ranks"]:
        assert [row["rollout_micro_batch"] for row in found["rows"]] == [8, 2, 2]
        assert found["largest"] == 2  # of the first rank too, whose memory is enough
        assert found["resumed_with"] == 2
        for row, expected in zip(found["rows"], found["expected"], strict=True):
            assert row["rollout_evaluations"] == expected["rollout_evaluations"]
            assert row["images_scored"] == expected["images_scored"]
            assert row["reward/hps/mean"] == pytest.approx(expected["reward/hps/mean"], abs=1e-4)
            assert row["ratio_deviation"] < 2e-5


def test_a_sharded_rank_that_runs_out_ends_the_run_to_be_resumed(
    smoke_assets: Path, tmp_path: Path
) -> None:
    assert find(smoke_assets, tmp_path, "short_rollout_sharded") != 0
    folder = tmp_path / "short_rollout_sharded"
    assert json.loads((folder / "stopped.json").read_text()) == {"resume": True}
    config = config_for(smoke_assets, execution={"rollout_micro_batch": 8})
    assert trainer_for(config, folder / "run").sizes.rollout.states == 4


def test_sharded_blocks_can_be_compiled(findings: Path) -> None:
    found = json.loads((findings / "compiled.json").read_text())
    plain, compiled = found["rows"]
    assert found["graphs"] >= 4  # two kinds of blocks, with and without gradients
    assert compiled["ratio_deviation"] < 2e-5
    assert compiled["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-4)


def test_a_short_rollout_says_so_once_and_has_the_same_noise(
    smoke_assets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(smoke_assets, execution={"rollout_micro_batch": 8})
    rolled: dict[str, Any] = {}
    for name, limit in (("enough", 100), ("short", 4)):
        trainer = trainer_for(config, tmp_path / name)
        prompts = trainer.local_prompts()
        with (
            caplog.at_level(logging.WARNING),
            exhausted_memory(trainer.policy, limit, training=False),
        ):
            rolled[name] = trainer.rollout(prompts)
            rolled[name] = trainer.rollout(prompts)
    warnings = [record.message for record in caplog.records if "out of memory" in record.message]
    assert warnings == [
        "out of memory in the rollout: retrying with 4 states at a time instead of 8"
    ]
    assert rolled["short"].velocity_evaluations == rolled["enough"].velocity_evaluations
    for one, two in zip(rolled["enough"].recorded, rolled["short"].recorded, strict=True):
        # The noise is (x' - mean) / std: the same but for the rounding of the mean.
        torch.testing.assert_close(two.next_latents, one.next_latents, rtol=0, atol=2e-5)
        torch.testing.assert_close(two.log_prob, one.log_prob, rtol=0, atol=2e-6)
    assert "rollout_micro_batch" not in {k for k, v in vars(trainer.progress).items() if v}
    assert trainer.iterate()["rollout_micro_batch"] == 4
    assert trainer.progress.rollout_micro_batch == 4


def test_a_single_state_that_does_not_fit_is_an_error_with_a_fix(
    smoke_assets: Path, tmp_path: Path
) -> None:
    trainer = trainer_for(config_for(smoke_assets), tmp_path)
    with (
        exhausted_memory(trainer.policy, 0, training=False),
        pytest.raises(UserError, match=r"one state at a time.*bfloat16.*resolution"),
    ):
        trainer.iterate()


def test_decoding_halves_its_slices_as_well(smoke_assets: Path, tmp_path: Path) -> None:
    trainer = trainer_for(config_for(smoke_assets), tmp_path)
    policy = trainer.policy
    latents = policy.pack(torch.randn(7, *policy.latent_shape))
    expected, decode = policy.decode(latents), policy.vae.decode
    asked: list[int] = []

    def limited(scaled: Tensor, **rest: Any) -> Any:
        asked.append(len(scaled))
        if len(scaled) > 2:
            raise torch.OutOfMemoryError("no memory left")
        return decode(scaled, **rest)

    policy.vae.decode = limited
    size = decode_size(policy.config.pixels)
    size.states = 5
    found = torch.cat(list(policy.decode_slices(latents, size)))
    assert asked == [5, 2, 2, 2, 1]
    assert size.states == 2
    assert size.reduced
    # Rounding to bytes may tip where the batch changes the last bit.
    assert int((found.int() - expected.int()).abs().max()) <= 1
    row = trainer.iterate()
    assert trainer.progress.decode_images == 2
    assert row["decode_images"] == 2


def test_auto_takes_what_fits(smoke_assets: Path, tmp_path: Path) -> None:
    trainer = trainer_for(config_for(smoke_assets), tmp_path)
    assert trainer.config.execution.rollout_micro_batch == "auto"
    assert trainer.sizes.rollout.states == LARGEST  # the CPU's memory is not asked
    one = state_bytes(trainer.policy)
    assert fitting_states(trainer.policy, 0) == 1
    assert fitting_states(trainer.policy, 13 * one) == 10
    assert fitting_states(trainer.policy, 10_000 * one) == LARGEST
    size = BatchSize(4)
    for states, reduced in ((None, False), (8, False), (3, True)):
        size.lower(states)
        assert size.reduced == reduced
    assert size.states == 3
