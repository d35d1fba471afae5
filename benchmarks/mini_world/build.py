"""Builds the assets of the mini world part by part, and the manifest that tells how.

A part is built again only where its settings, its seed, or what it is built from has changed, or
its files are not those that the manifest names; so an interrupted build goes on where it was.
"""

import json
import multiprocessing
import platform
import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from benchmarks.mini_world import attribute_training, autoencoder, base_policy, judges, world
from benchmarks.mini_world.attribute_training import AttributeSettings
from benchmarks.mini_world.autoencoder import AutoencoderSettings
from benchmarks.mini_world.base_policy import PolicySettings
from benchmarks.mini_world.judges import JudgeSettings, PictureSettings
from g2rpo.config import StrictModel, content_hash
from g2rpo.errors import UserError
from g2rpo.files import (
    atomic_folder,
    atomic_write_text,
    sha256_file,
    sha256_tree,
    write_json,
)
from g2rpo.progress import ProgressReport, without_library_bars
from g2rpo.rewards.attributes import AttributeReader

MANIFEST = "manifest.json"
SIZE_LIMIT = 25_000_000
"""Most bytes that all assets together may have, for they are committed."""


class WorldSettings(StrictModel):
    """The captions."""

    train: int = Field(default=6000, ge=1)
    validation: int = Field(default=200, ge=1)
    test: int = Field(default=400, ge=1)


class MiniWorldSettings(StrictModel):
    """Everything that decides what is built."""

    seed: int = 1
    prompts: WorldSettings = WorldSettings()
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    attributes: AttributeSettings = AttributeSettings()
    policy: PolicySettings = PolicySettings()
    judge_pictures: PictureSettings = PictureSettings()
    judges: dict[str, JudgeSettings] = judges.SETTINGS


@dataclass(frozen=True)
class Part:
    """One part: where its files lie, what it is built from, and how it is built."""

    name: str
    outputs: tuple[str, ...]
    needs: tuple[str, ...]
    build: Callable[[MiniWorldSettings, Path], dict[str, Any]]
    """Writes the outputs below the assets' folder; returns what it measured."""

    def settings(self, settings: MiniWorldSettings) -> dict[str, Any]:
        """What of all settings decides how this part comes out."""
        dumped = settings.model_dump(mode="json")
        if self.name in settings.judges:
            return {"pictures": dumped["judge_pictures"], "training": dumped["judges"][self.name]}
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
    """Trains the attribute judge."""
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


def build_judge(role: str, settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    """Trains the judge in the role of one published reward model."""
    return judges.build_judge(
        role, assets, settings.seed, settings.judges[role], settings.judge_pictures
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
        Part(role, (f"rewards/{role}",), ("autoencoder",), partial(build_judge, role))
        # The one that takes longest first, so that no worker is idle at the end.
        for role in sorted(judges.MODELS, key=lambda role: role != "image_reward")
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
    tell: Callable[[str], None] = lambda _: None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Builds what is missing below ``assets`` and returns the manifest.

    Up to ``jobs`` parts are built at a time, each in a process with one thread, so that neither
    the number of jobs nor that of cores changes what is built.

    Raises:
        UserError: ``rebuild`` names no part, or the assets are larger than may be committed.
    """
    unknown = rebuild - {part.name for part in PARTS}
    if unknown:
        raise UserError(
            f"no part is called {sorted(unknown)[0]!r}; parts: {', '.join(p.name for p in PARTS)}"
        )
    path = assets / MANIFEST
    manifest: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"parts": {}}
    hashes: dict[str, str | None] = {}
    waiting = list(PARTS)
    running: dict[Future[Built], tuple[Part, str]] = {}
    failures: list[BaseException | None] = []
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), _start_worker, max_tasks_per_child=1
    ) as pool:
        while waiting or running:
            # In the order of PARTS, as workers are free: what takes long stands before the rest.
            for part in [part for part in waiting if hashes.keys() >= set(part.needs)]:
                if len(running) == jobs:
                    break
                waiting.remove(part)
                chosen = part.settings(settings)
                inputs = content_hash([settings.seed, chosen, [hashes[n] for n in part.needs]])
                found = outputs_hash(part, assets)
                old = manifest["parts"].get(part.name, {})
                kept = (old.get("inputs"), old.get("outputs")) == (inputs, found)
                if kept and found is not None and part.name not in rebuild:
                    hashes[part.name] = found
                    tell(f"{part.name}: already built")
                else:
                    running[pool.submit(_build_part, part, settings, assets)] = part, inputs
                    tell(f"{part.name}: building")
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                part, inputs = running.pop(future)
                if future.exception() is not None:
                    failures.append(future.exception())
                    waiting.clear()  # what runs now is still finished and kept
                    continue
                built = future.result()
                hashes[part.name] = outputs_hash(part, assets)
                manifest["parts"][part.name] = {
                    "inputs": inputs,
                    "outputs": hashes[part.name],
                    "settings": part.settings(settings),
                    **asdict(built),
                }
                manifest |= describe(settings, assets)
                write_json(path, manifest)
                tell(f"{part.name}: done in {built.seconds:.0f} s")
    for failure in failures:
        raise failure or AssertionError
    if manifest["bytes"] > SIZE_LIMIT:
        raise UserError(
            f"the assets have {manifest['bytes']} bytes, more than {SIZE_LIMIT}: make them smaller"
        )
    return manifest


@dataclass(frozen=True)
class Built:
    """What building a part took, and what was measured on it."""

    seconds: float
    cpu_seconds: float
    measured: dict[str, Any]


def _build_part(part: Part, settings: MiniWorldSettings, assets: Path) -> Built:
    start, cpu = time.monotonic(), time.process_time()
    with without_library_bars():
        measured = part.build(settings, assets)
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu
    return Built(round(seconds, 1), round(cpu_seconds, 1), measured)


def _start_worker() -> None:
    torch.set_num_threads(1)
    ProgressReport.bars = False


def describe(settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    """Seed, files with sizes and hashes, and the software and machine they were built with."""
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
