"""A tiny random CLIP with the head of the aesthetic score, in the files of the large ones."""

from pathlib import Path

import torch

from benchmarks.mini_world.small_rewards import SmallPickScore, liven
from benchmarks.mini_world.tokenizers import words
from g2rpo.rewards.aesthetic import HEAD
from g2rpo.rewards.image_reward import linear_head


def build_small_aesthetic(folder: Path, seed: int = 0) -> Path:
    """Builds a CLIP and its head in ``folder``, as ``aesthetic`` loads it by ``source``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = SmallPickScore(words())
        liven(small)
        small.save(folder)
        head = linear_head(small.width)
        liven(head)
        state = {f"layers.{key}": value for key, value in head.state_dict().items()}
        torch.save(state, folder / f"{HEAD}.pth")
    return folder
