"""Published weights laid over a base: every layout they come in, and one line for every mistake."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_flux import refusal
from torch import Tensor

from g2rpo.policy import CheckpointConfig, Policy, PolicyConfig, load_policy
from g2rpo.policy.checkpoint import find_checkpoint

NAME = "diffusion_pytorch_model"


@pytest.fixture
def base(flux_folder: Path) -> Policy:
    config = PolicyConfig(source=str(flux_folder), resolution=32, max_sequence_length=32)
    return load_policy(config, "cpu")


@pytest.fixture(scope="module")
def tuned(flux_folder: Path) -> dict[str, Tensor]:
    """The base's tensors, all moved."""
    state = load_file(flux_folder / "transformer" / f"{NAME}.safetensors")
    draws = torch.Generator().manual_seed(3)
    return {key: t + 0.1 * torch.randn(t.shape, generator=draws) for key, t in state.items()}


def load(policy: Policy, source: Path | str, **place: Any) -> None:
    policy.load_checkpoint(find_checkpoint(CheckpointConfig(source=str(source), **place)))


def holds(policy: Policy, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, state[key]) for key, t in policy.transformer.state_dict().items())


def in_shards(state: dict[str, Tensor], folder: Path, *, index: bool = True) -> Path:
    """Two files of one state dict, as diffusers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = sorted(state)
    place = {key: f"{NAME}-0000{1 + (i % 2)}-of-00002.safetensors" for i, key in enumerate(keys)}
    for name in set(place.values()):
        save_file({k: state[k] for k in keys if place[k] == name}, folder / name)
    if index:
        text = json.dumps({"weight_map": place})
        (folder / f"{NAME}.safetensors.index.json").write_text(text)
    return folder


def test_every_layout_gives_the_same_weights(
    base: Policy, flux_folder: Path, tuned: dict[str, Tensor], tmp_path: Path
) -> None:
    saved = tmp_path / "repository"
    diffusers = saved / "checkpoint-300-0"
    diffusers.mkdir(parents=True)
    shutil.copy(flux_folder / "transformer" / "config.json", diffusers)
    save_file(tuned, diffusers / f"{NAME}.safetensors")
    save_file(tuned, saved / "alone.safetensors")
    sharded = in_shards(tuned, tmp_path / "sharded")
    pipeline = tmp_path / "pipeline"
    shutil.copytree(diffusers, pipeline / "transformer")
    places: list[dict[str, Any]] = [
        {"source": diffusers},
        {"source": saved, "subfolder": "checkpoint-300-0"},
        {"source": saved, "subfolder": "checkpoint-300-0", "file": f"{NAME}.safetensors"},
        {"source": saved / "alone.safetensors"},
        {"source": saved, "file": "alone.safetensors"},
        {"source": sharded},
        {"source": sharded / f"{NAME}.safetensors.index.json"},
        {"source": in_shards(tuned, tmp_path / "bare", index=False)},
        {"source": pipeline},
    ]
    for place in places:
        untouched = base.with_base_transformer()
        assert not holds(untouched, tuned)
        load(untouched, **place)
        assert holds(untouched, tuned), place


def test_weights_in_half_precision_go_into_the_base_s_own(
    base: Policy, tuned: dict[str, Tensor], tmp_path: Path
) -> None:
    half = {key: tensor.bfloat16() for key, tensor in tuned.items()}
    save_file(half, tmp_path / "half.safetensors")
    load(base, tmp_path / "half.safetensors")
    assert holds(base, {key: tensor.float() for key, tensor in half.items()})
    assert {p.dtype for p in base.transformer.parameters()} == {torch.float32}


def test_the_base_beside_a_tuned_policy_stays_as_it_was(
    base: Policy, tuned: dict[str, Tensor], tmp_path: Path
) -> None:
    before = {key: tensor.clone() for key, tensor in base.transformer.state_dict().items()}
    other = base.with_base_transformer()
    save_file(tuned, tmp_path / "tuned.safetensors")
    load(base, tmp_path / "tuned.safetensors")
    assert holds(base, tuned)
    assert holds(other, before)


def _without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != "proj_out.bias"}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (_without, "proj_out.bias is missing (1 tensors missing, 0 unknown)"),
    "unknown": (lambda s: {**s, "ema.decay": torch.ones(1)}, "ema.decay is unknown"),
    "shape": (
        lambda s: {**s, "proj_out.bias": torch.zeros(7)},
        "proj_out.bias has shape [7], expected [64]",
    ),
    "original names": (lambda s: {"double_blocks.0.img_mod.lin.bias": torch.ones(2)}, "convert it"),
    "adapter": (lambda s: {"x_embedder.lora_A.weight": torch.ones(2)}, "use a LoRA for"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_wrong_tensors_are_reported_before_anything_is_changed(
    base: Policy, tuned: dict[str, Tensor], tmp_path: Path, case: str
) -> None:
    change, message = WRONG[case]
    before = {key: tensor.clone() for key, tensor in base.transformer.state_dict().items()}
    path = tmp_path / "wrong.safetensors"
    save_file(change(tuned), path)
    line = refusal(lambda: load(base, path))
    assert message in line and "wrong.safetensors" in line
    assert holds(base, before)


def test_wrong_files_are_reported(
    base: Policy, flux_folder: Path, tuned: dict[str, Tensor], tmp_path: Path
) -> None:
    sharded = in_shards(tuned, tmp_path / "sharded")
    (sharded / f"{NAME}-00002-of-00002.safetensors").unlink()
    assert "1 of the 2 files in" in refusal(lambda: load(base, sharded))
    assert "no weights" in refusal(lambda: load(base, tmp_path))
    assert "no such folder or file" in refusal(lambda: load(base, tmp_path, file="a.safetensors"))
    assert "not a hub id" in refusal(lambda: load(base, tmp_path / "nowhere"))
    torch.save(tuned, tmp_path / "pickled.pt")
    assert "only safetensors files" in refusal(lambda: load(base, tmp_path / "pickled.pt"))
    (tmp_path / "cut").mkdir()
    save_file(tuned, tmp_path / "cut" / "cut.safetensors")
    whole = (tmp_path / "cut" / "cut.safetensors").read_bytes()
    (tmp_path / "cut" / "cut.safetensors").write_bytes(whole[:-100])
    assert "cut.safetensors is not a readable" in refusal(lambda: load(base, tmp_path / "cut"))
    both = tmp_path / "both"
    shutil.copytree(flux_folder / "transformer", both)
    shutil.copy(both / f"{NAME}.safetensors", both / "ema.safetensors")
    assert "several files" in refusal(lambda: load(base, both))
    load(base, both, file="ema.safetensors")
    config = json.loads((both / "config.json").read_text())
    (both / "config.json").write_text(json.dumps(config | {"guidance_embeds": False}))
    line = refusal(lambda: load(base, both, file="ema.safetensors"))
    assert "guidance_embeds=False" in line


def test_only_what_is_named_is_fetched_from_the_hub(
    base: Policy, tuned: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / ("c" * 40)
    place = snapshot / "checkpoint-300-0"
    place.mkdir(parents=True)
    save_file(tuned, place / f"{NAME}.safetensors")
    asked: dict[str, Any] = {}

    def fetch(source: str, **options: Any) -> str:
        asked.update(options, source=source)
        return str(snapshot)

    monkeypatch.setattr("g2rpo.hub.fetch.snapshot_download", fetch)
    config = CheckpointConfig(source="owner/name", subfolder="checkpoint-300-0", revision="v1")
    files = find_checkpoint(config)
    assert (asked["source"], asked["revision"]) == ("owner/name", "v1")
    assert all(pattern.startswith("checkpoint-300-0/") for pattern in asked["allow_patterns"])
    assert files.label == f"owner/name@{'c' * 40}/checkpoint-300-0"
    base.load_checkpoint(files)
    assert holds(base, tuned)
    absent = config.model_copy(update={"subfolder": "checkpoint-400-0"})
    assert "checkpoint.subfolder" in refusal(lambda: find_checkpoint(absent))


def test_a_hub_id_that_is_not_cached_while_offline() -> None:
    line = refusal(lambda: find_checkpoint(CheckpointConfig(source="nobody/no-such-weights")))
    assert "checkpoint source 'nobody/no-such-weights'" in line
