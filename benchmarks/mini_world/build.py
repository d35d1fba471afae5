"""Builds the assets of the mini world part by part, with a manifest of how each was made.

A part is rebuilt only if its settings, its seed or its inputs have changed, or if its files do not
match the manifest, so an interrupted build resumes where it stopped.
"""

import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from benchmarks.mini_world import (
    attribute_training,
    autoencoder,
    base_policy,
    reward_training,
    world,
)
from benchmarks.mini_world.attribute_training import AttributeSettings
from benchmarks.mini_world.autoencoder import AutoencoderSettings
from benchmarks.mini_world.base_policy import PolicySettings
from benchmarks.mini_world.reward_training import PictureSettings, RewardSettings
from g2rpo.config import StrictModel, content_hash
from g2rpo.errors import UserError
from g2rpo.files import (
    atomic_folder,
    atomic_write_text,
    sha256_file,
    sha256_tree,
    write_json,
)
from g2rpo.progress import without_library_bars
from g2rpo.rewards.attributes import AttributeReader

MANIFEST = "manifest.json"
SIZE_LIMIT = 25_000_000
"""Largest total size of the assets in bytes; they are committed."""


class WorldSettings(StrictModel):
    """The captions."""

    train: int = Field(default=6000, ge=1)
    validation: int = Field(default=200, ge=1)
    test: int = Field(default=400, ge=1)


class MiniWorldSettings(StrictModel):
    """All settings of a build."""

    seed: int = 1
    prompts: WorldSettings = WorldSettings()
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    attributes: AttributeSettings = AttributeSettings()
    policy: PolicySettings = PolicySettings()
    reward_pictures: PictureSettings = PictureSettings()
    rewards: dict[str, RewardSettings] = reward_training.SETTINGS


@dataclass(frozen=True)
class Part:
    """One part of the assets: its files, the parts it depends on, and its build function."""

    name: str
    outputs: tuple[str, ...]
    needs: tuple[str, ...]
    build: Callable[[MiniWorldSettings, Path], dict[str, Any]]
    """Writes the outputs below the assets' folder; returns what it measured."""

    def settings(self, settings: MiniWorldSettings) -> dict[str, Any]:
        """The settings that this part depends on."""
        dumped = settings.model_dump(mode="json")
        if self.name in settings.rewards:
            return {"pictures": dumped["reward_pictures"], "training": dumped["rewards"][self.name]}
        chosen: dict[str, Any] = dumped[self.name]
        return chosen


def build_prompts(settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    """Writes the captions of the three splits, one a line."""
    numbers = settings.prompts.model_dump()
    with atomic_folder(assets / "prompts") as folder:
        for split, number in numbers.items():
            captions = world.make_captions(settings.seed, split, number)
            atomic_write_text(folder / f"{split}.txt", "\n".join(captions) + "\n")
    held_out = [world.held_out(world.scene_of(text)) for text in captions_of(assets, "test")]
    return {"test_with_held_out_combination": round(sum(held_out) / len(held_out), 4)}


def build_autoencoder(settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    """Trains the autoencoder."""
    with atomic_folder(assets / "policy" / "vae") as folder:
        return autoencoder.train(settings.autoencoder, settings.seed, folder)


def build_attributes(settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    """Trains the attribute reward model."""
    vae = autoencoder.load(assets)
    with atomic_folder(assets / "rewards" / "attributes") as folder:
        return attribute_training.train(settings.attributes, settings.seed, vae, folder)


def build_policy(settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    """Trains the base policy and measures it on held-out captions."""
    vae = autoencoder.load(assets)
    reader = AttributeReader.from_folder(assets / "rewards" / "attributes")
    chosen = settings.policy
    validation = base_policy.AttributeCheck(
        reader, vae, captions_of(assets, "validation"), chosen.check_steps
    )
    with atomic_folder(assets / "policy") as folder:
        policy, report = base_policy.train(chosen, settings.seed, vae, folder, validation.accuracy)
        # Byte for byte the autoencoder's own files, which other parts are built from.
        shutil.rmtree(folder / "vae")
        shutil.copytree(assets / "policy" / "vae", folder / "vae")
    report["test"] = {
        f"{steps} steps": base_policy.AttributeCheck(
            reader, vae, captions_of(assets, "test"), steps
        ).report(policy)
        for steps in (chosen.check_steps, 10, 16)
    }
    return report


def build_reward(role: str, settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    """Trains the small counterpart of one published reward model."""
    return reward_training.build_reward(
        role, assets, settings.seed, settings.rewards[role], settings.reward_pictures
    )


PARTS = (
    Part("prompts", ("prompts",), (), build_prompts),
    Part("autoencoder", ("policy/vae",), (), build_autoencoder),
    Part("attributes", ("rewards/attributes",), ("autoencoder",), build_attributes),
    Part(
        "policy",
        tuple(
            f"policy/{name}"
            for name in (
                "model_index.json",
                "scheduler",
                "text_encoder",
                "text_encoder_2",
                "tokenizer",
                "tokenizer_2",
                "transformer",
            )
        ),
        ("prompts", "autoencoder", "attributes"),
        build_policy,
    ),
    *(
        Part(role, (f"rewards/{role}",), ("autoencoder",), partial(build_reward, role))
        for role in reward_training.MODELS
    ),
)


def captions_of(assets: Path, split: str) -> list[str]:
    """The captions of a split that was built below ``assets``."""
    return (assets / "prompts" / f"{split}.txt").read_text().splitlines()


def outputs_hash(part: Part, assets: Path) -> str | None:
    """One hash of the files of ``part``, or None where one is missing."""
    hashes = {}
    for output in part.outputs:
        path = assets / output
        if path.is_dir():
            hashes[output] = sha256_tree(path)
        elif path.is_file():
            hashes[output] = sha256_file(path)
        else:
            return None
    return content_hash(hashes)


def build(
    settings: MiniWorldSettings,
    assets: Path,
    rebuild: frozenset[str] = frozenset(),
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Builds what is missing below ``assets`` and returns the manifest.

    PyTorch uses one thread, so the number of cores does not change the result.

    Raises:
        UserError: ``rebuild`` names an unknown part, or the assets exceed :data:`SIZE_LIMIT`.
    """
    unknown = rebuild - {part.name for part in PARTS}
    if unknown:
        names = ", ".join(part.name for part in PARTS)
        raise UserError(f"--rebuild {sorted(unknown)[0]}: no such part; choose from {names}")
    torch.set_num_threads(1)
    path = assets / MANIFEST
    manifest: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"parts": {}}
    hashes: dict[str, str | None] = {}
    for part in PARTS:
        chosen = part.settings(settings)
        inputs = content_hash([settings.seed, chosen, [hashes[n] for n in part.needs]])
        hashes[part.name] = outputs = outputs_hash(part, assets)
        old = manifest["parts"].get(part.name, {})
        unchanged = (old.get("inputs"), old.get("outputs")) == (inputs, outputs)
        if outputs is not None and unchanged and part.name not in rebuild:
            log(f"{part.name}: up to date")
            continue
        log(f"{part.name}: building")
        start, cpu = time.monotonic(), time.process_time()
        with without_library_bars():
            measured = part.build(settings, assets)
        seconds = time.monotonic() - start
        hashes[part.name] = outputs_hash(part, assets)
        manifest["parts"][part.name] = {
            "inputs": inputs,
            "outputs": hashes[part.name],
            "settings": chosen,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "measured": measured,
        }
        manifest |= describe(settings, assets)
        write_json(path, manifest)
        log(f"{part.name}: done in {seconds:.0f} s")
    if manifest["bytes"] > SIZE_LIMIT:
        raise UserError(f"{assets}: {manifest['bytes']} bytes exceed the limit of {SIZE_LIMIT}")
    return manifest


def describe(settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    """Seed, files with sizes and hashes, package versions and the machine."""
    files = {
        path.relative_to(assets).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in sorted(assets.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    return {
        "seed": settings.seed,
        "files": files,
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "packages": {
            name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")
        },
        "machine": {"architecture": platform.machine(), "threads_per_part": 1},
    }
