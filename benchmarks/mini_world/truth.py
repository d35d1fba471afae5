"""Scores of the rendered truth: those of a policy that draws every caption without error."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.mini_world import autoencoder, world
from g2rpo.files import sha256_file, write_json
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.registry import load_reward
from g2rpo.seeds import generator

SPLITS = ("validation", "test")


def write_truth(assets: Path, seed: int, rewards: Sequence[str], file: Path) -> dict[str, Any]:
    """Scores a decoded picture of each validation and test caption with every reward model.

    Writes for each split the hash of its captions and, for each reward, the hash of its weights,
    its score of each caption and their mean. Returns the means.
    """
    vae = autoencoder.load(assets)
    models = {
        name: load_reward(
            RewardConfig(model=name, source=str(assets / "rewards" / name), batch_size=128), "cpu"
        )
        for name in rewards
    }
    truth: dict[str, Any] = {}
    for split in SPLITS:
        captions_file = assets / "prompts" / f"{split}.txt"
        captions = captions_file.read_text().splitlines()
        rng = generator(seed, f"truth-{split}")
        pictures = np.stack([world.render(world.scene_of(text), rng) for text in captions])
        latents = autoencoder.encode(vae, torch.from_numpy(pictures), sample=False)
        decoded = autoencoder.decode(vae, latents)
        truth[split] = {"captions": sha256_file(captions_file), "rewards": {}}
        for name, model in models.items():
            scores = model.score(decoded, captions).double()
            truth[split]["rewards"][name] = {
                "weights": model.weights_hash,
                "mean": round(scores.mean().item(), 6),
                "scores": [round(score, 6) for score in scores.tolist()],
            }
    write_json(file, truth)
    return {
        split: {name: scored["mean"] for name, scored in entry["rewards"].items()}
        for split, entry in truth.items()
    }
