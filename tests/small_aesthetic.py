"""A tiny random CLIP with the head of the aesthetic score, in the files of the large ones."""

from pathlib import Path

import torch

from benchmarks.mini_world.small_rewards import SmallPickScore, liven
from benchmarks.mini_world.tokenizers import words
from benchmarks.speed.reward_towers import save_aesthetic_head


def build_small_aesthetic(folder: Path, seed: int = 0) -> Path:
    """Builds a CLIP and its head in ``folder``, as ``aesthetic`` loads it by ``source``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = SmallPickScore(words())
        liven(small)
        small.save(folder)
        save_aesthetic_head(folder, small.width)
    return folder
