"""The reward models by name. A new one needs its own file and one line here."""

from importlib import import_module
from typing import cast

import torch

from g2rpo.config import nearest
from g2rpo.errors import UserError
from g2rpo.progress import without_library_bars
from g2rpo.rewards.base import BatchedReward, RewardConfig

# "module:Class", imported at first use, so that a run needs only the libraries of its rewards.
REWARDS: dict[str, str] = {
    "hps": "g2rpo.rewards.hps:HPS",
    "clip": "g2rpo.rewards.clip_score:CLIPScore",
    "pick_score": "g2rpo.rewards.pick_score:PickScore",
    "image_reward": "g2rpo.rewards.image_reward:ImageReward",
    "unified_reward": "g2rpo.rewards.unified_reward.reward:UnifiedReward",
    "hpsv3": "g2rpo.rewards.hpsv3:HPSv3",
    "aesthetic": "g2rpo.rewards.aesthetic:AestheticScore",
    "vqa_score": "g2rpo.rewards.vqa_score:VQAScore",
    "attributes": "g2rpo.rewards.attributes:AttributeReward",
    "http": "g2rpo.rewards.http:HTTPReward",
}


def check_reward_name(name: str) -> None:
    """Raises :class:`UserError` with the closest match unless ``name`` is registered."""
    if name not in REWARDS:
        raise UserError(f"unknown reward {name!r}; {nearest(name, REWARDS)}")


def load_reward(config: RewardConfig, device: torch.device | str) -> BatchedReward:
    """Loads the reward model that ``config`` names.

    Raises:
        UserError: the name is not registered, or the weights cannot be loaded.
    """
    check_reward_name(config.model)
    module, _, cls = REWARDS[config.model].partition(":")
    loader = getattr(import_module(module), cls)
    if config.question is not None and not loader.asks_question:
        raise UserError(f"reward {config.model}: asks no question; remove `question`")
    with without_library_bars():
        return cast(BatchedReward, loader.load(config, device))
