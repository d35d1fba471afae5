"""Builds the assets of the mini world part by part, with a manifest of how each was made.

A part is rebuilt only if its settings, its seed or its inputs have changed, or if its files do not
match the manifest, so an interrupted build resumes where it stopped. Parts that do not need each
other are built in several processes at once.
"""

import json
import logging
import multiprocessing
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from benchmarks.mini_world import (
    attribute_training,
    autoencoder,
    base_policy,
    reward_training,
    small_policies,
    world,
)
from benchmarks.mini_world.attribute_training import AttributeSettings
from benchmarks.mini_world.autoencoder import AutoencoderSettings
from benchmarks.mini_world.base_policy import AttributeCheck, Policy, PolicySettings
from benchmarks.mini_world.reward_training import PictureSettings, RewardSettings
from benchmarks.mini_world.small_policies import FluxSettings, SD3Settings
from g2rpo.config import StrictModel, content_hash
from g2rpo.errors import UserError
from g2rpo.files import (
    atomic_folder,
    atomic_write_text,
    remove,
    sha256_file,
    sha256_tree,
    write_json,
)
from g2rpo.progress import ProgressReport, without_library_bars
from g2rpo.rewards.attributes import AttributeReader
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.registry import load_reward
from g2rpo.seeds import generator

logger = logging.getLogger(__name__)

VERSION = 2
"""Version of the world; the manifest of version 1 names none. A new one rebuilds every part."""
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
    policy: FluxSettings = FluxSettings()
    sd3_policy: SD3Settings = SD3Settings()
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
        chosen: dict[str, Any] = dumped.get(self.name, {})
        return chosen

    def inputs(self, settings: MiniWorldSettings, hashes: dict[str, str | None]) -> str:
        """One hash of what this part is built from; ``hashes`` are those of the parts' files."""
        needed = [hashes[name] for name in self.needs]
        return content_hash([VERSION, settings.seed, self.settings(settings), needed])


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
    """Trains the FLUX base policy and measures it on held-out captions."""
    with tempfile.TemporaryDirectory(dir=assets) as temporary:
        build = partial(small_policies.build_flux, settings.policy)
        report = _train_policy(build, settings.policy, settings.seed, assets, Path(temporary))
        # The autoencoder's folder stays: other parts may be reading it now.
        for output in POLICY_OUTPUTS:
            remove(assets / output)
            (Path(temporary) / Path(output).name).rename(assets / output)
    return report


def build_sd3_policy(settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    """Trains the SD3 base policy and measures it on held-out captions."""
    with atomic_folder(assets / "sd3_policy") as folder:
        build = partial(small_policies.build_sd3, settings.sd3_policy)
        report = _train_policy(build, settings.sd3_policy, settings.seed, assets, folder)
        # The same bytes as the first policy's, whose configuration names no folder.
        shutil.copytree(assets / "policy" / "vae", folder / "vae", dirs_exist_ok=True)
    return report


def _train_policy(
    build: Callable[[Path], Policy],
    chosen: PolicySettings,
    seed: int,
    assets: Path,
    folder: Path,
) -> dict[str, Any]:
    """Saves the pipeline of a policy from ``build``, trained, to ``folder``."""
    vae = autoencoder.load(assets)
    reader = AttributeReader.from_folder(assets / "rewards" / "attributes")
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as tokenizers:
        policy = build(Path(tokenizers))
    validation = AttributeCheck(reader, vae, captions_of(assets, "validation"), chosen.check_steps)
    report = base_policy.train(policy, chosen, seed, vae, validation.accuracy)
    policy.pipeline(vae).save_pretrained(folder, safe_serialization=True)
    test = captions_of(assets, "test")
    report["test"] = {
        f"{steps} steps": AttributeCheck(reader, vae, test, steps).report(policy)
        for steps in (chosen.check_steps, 10, 16)
    }
    return report


def build_reward(role: str, settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    """Trains the small counterpart of one published reward model."""
    return reward_training.build_reward(
        role, assets, settings.seed, settings.rewards[role], settings.reward_pictures
    )


def build_truth(settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    """Scores a decoded picture of each validation and test caption with every reward model.

    They are the scores of a policy that draws every caption without error. Writes for each split
    the hash of its captions and, for each reward, the hash of its weights, its score of each
    caption and their mean. Returns the means.
    """
    vae = autoencoder.load(assets)
    models = {
        name: load_reward(
            RewardConfig(model=name, source=str(assets / "rewards" / name), batch_size=128), "cpu"
        )
        for name in (*reward_training.MODELS, "attributes")
    }
    truth: dict[str, Any] = {}
    for split in ("validation", "test"):
        captions = captions_of(assets, split)
        rng = generator(settings.seed, f"truth-{split}")
        pictures = np.stack([world.render(world.scene_of(text), rng) for text in captions])
        latents = autoencoder.encode(vae, torch.from_numpy(pictures), sample=False)
        decoded = autoencoder.decode(vae, latents)
        truth[split] = {"captions": sha256_file(assets / "prompts" / f"{split}.txt"), "rewards": {}}
        for name, model in models.items():
            scores = model.score(decoded, captions).double()
            truth[split]["rewards"][name] = {
                "weights": model.weights_hash,
                "mean": round(scores.mean().item(), 6),
                "scores": [round(score, 6) for score in scores.tolist()],
            }
    write_json(assets / "truth.json", truth)
    return {
        split: {name: scored["mean"] for name, scored in entry["rewards"].items()}
        for split, entry in truth.items()
    }


POLICY_OUTPUTS = tuple(
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
)

PARTS = (
    Part("prompts", ("prompts",), (), build_prompts),
    Part("autoencoder", ("policy/vae",), (), build_autoencoder),
    Part("attributes", ("rewards/attributes",), ("autoencoder",), build_attributes),
    Part("policy", POLICY_OUTPUTS, ("prompts", "autoencoder", "attributes"), build_policy),
    Part("sd3_policy", ("sd3_policy",), ("prompts", "autoencoder", "attributes"), build_sd3_policy),
    *(
        Part(role, (f"rewards/{role}",), ("autoencoder",), partial(build_reward, role))
        for role in reversed(reward_training.MODELS)  # the longest training first
    ),
    Part(
        "truth",
        ("truth.json",),
        ("prompts", "autoencoder", "attributes", *reward_training.MODELS),
        build_truth,
    ),
)
"""Every part after those it needs; of those that are ready, the first is built first."""


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
    processes: int = 2,
) -> dict[str, Any]:
    """Builds what is missing below ``assets`` and returns the manifest.

    Every part has one thread and its own random numbers, so neither the number of cores nor that
    of ``processes`` changes the result. If a part fails, those being built are finished first.

    Raises:
        UserError: ``rebuild`` names an unknown part, or the assets exceed :data:`SIZE_LIMIT`.
    """
    unknown = rebuild - {part.name for part in PARTS}
    if unknown:
        names = ", ".join(part.name for part in PARTS)
        raise UserError(f"--rebuild {sorted(unknown)[0]}: no such part; choose from {names}")
    assets.mkdir(parents=True, exist_ok=True)
    path = assets / MANIFEST
    manifest: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"parts": {}}
    hashes: dict[str, str | None] = {}
    waiting = list(PARTS)
    running: dict[Future[dict[str, Any]], Part] = {}
    failures: list[BaseException] = []
    built: list[str] = []
    start = time.monotonic()
    with _workers(processes) as pool:
        while waiting or running:
            for part in [part for part in waiting if set(part.needs) <= hashes.keys()]:
                if len(running) == processes:
                    break
                waiting.remove(part)
                outputs = outputs_hash(part, assets)
                inputs = part.inputs(settings, hashes)
                old = manifest["parts"].get(part.name, {})
                unchanged = (old.get("inputs"), old.get("outputs")) == (inputs, outputs)
                if outputs is not None and unchanged and part.name not in rebuild:
                    log(f"{part.name}: up to date")
                    hashes[part.name] = outputs
                    continue
                log(f"{part.name}: building")
                running[pool.submit(_build_part, part, settings, assets)] = part
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                part = running.pop(future)
                failure = future.exception()
                if failure is not None:
                    failures.append(failure)
                    waiting.clear()
                    continue
                hashes[part.name] = outputs_hash(part, assets)
                manifest["parts"][part.name] = {
                    "inputs": part.inputs(settings, hashes),
                    "outputs": hashes[part.name],
                    "settings": part.settings(settings),
                    **future.result(),
                }
                built.append(part.name)
                manifest |= describe(settings, assets, manifest["parts"].keys())
                manifest["last_build"] = {
                    "parts": built,
                    "processes": processes,
                    "seconds": round(time.monotonic() - start, 1),
                }
                write_json(path, manifest)
                log(f"{part.name}: done in {future.result()['seconds']:.0f} s")
    if failures:
        raise failures[0]
    if manifest["bytes"] > SIZE_LIMIT:
        raise UserError(f"{assets}: {manifest['bytes']} bytes exceed the limit of {SIZE_LIMIT}")
    return manifest


def build_second_world(folder: Path) -> None:
    """Builds what the profile ``mini-2`` lacks: the world of seed 2."""
    build(MiniWorldSettings(seed=2), folder, log=logger.info)


def _workers(processes: int) -> Executor:
    """Workers that build parts: processes, or one thread of this process."""
    if processes == 1:
        return ThreadPoolExecutor(1, initializer=partial(torch.set_num_threads, 1))
    # Forked from a server that has imported the libraries, and has none of PyTorch's threads yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(processes, context, _prepare_process)


def _prepare_process() -> None:
    torch.set_num_threads(1)
    ProgressReport.bars = False


def _build_part(part: Part, settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    """Builds ``part``; returns its seconds and what it measured."""
    start, cpu = time.monotonic(), time.process_time()
    with without_library_bars():
        measured = part.build(settings, assets)
    return {
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "measured": measured,
    }


def processor() -> str:
    """The processor's model and the instruction set that PyTorch uses on it."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def describe(settings: MiniWorldSettings, assets: Path, parts: Collection[str]) -> dict[str, Any]:
    """Version, seed, the files of ``parts`` with sizes and hashes, packages and the machine."""
    outputs = [assets / name for part in PARTS if part.name in parts for name in part.outputs]
    paths = {path for output in outputs for path in (output, *output.rglob("*")) if path.is_file()}
    files = {
        path.relative_to(assets).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in sorted(paths)
    }
    return {
        "version": VERSION,
        "seed": settings.seed,
        "files": files,
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "packages": {
            name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")
        },
        "machine": {
            "architecture": platform.machine(),
            "processor": processor(),
            "threads_per_part": 1,
        },
    }
