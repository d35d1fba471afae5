"""The reward models by name. A new one needs its own file and one line here."""

import pkgutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from g2rpo.config import nearest
from g2rpo.errors import UserError
from g2rpo.files import sha256_file
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
    "soft_tifa": "g2rpo.rewards.soft_tifa:SoftTIFA",
    "attributes": "g2rpo.rewards.attributes:AttributeReward",
    "http": "g2rpo.rewards.http:HTTPReward",
}


def check_reward_name(name: str) -> None:
    """Raises :class:`UserError` with the closest match unless ``name`` is registered."""
    if name not in REWARDS:
        raise UserError(f"unknown reward {name!r}; {nearest(name, REWARDS)}")


def reward_class(config: RewardConfig) -> type[BatchedReward]:
    """The class of the reward model that ``config`` names.

    Raises:
        UserError: the name is not registered, or ``config`` has a question that it does not ask.
    """
    check_reward_name(config.model)
    place = REWARDS[config.model]
    try:
        found = pkgutil.resolve_name(place)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"reward {config.model}: cannot import {place!r} ({error}); correct its line in "
            "g2rpo/rewards/registry.py"
        ) from error
    if not (isinstance(found, type) and issubclass(found, BatchedReward)):
        raise UserError(
            f"reward {config.model}: {place!r} is no subclass of BatchedReward; correct its line "
            "in g2rpo/rewards/registry.py to module:Class"
        )
    if missing := sorted(found.__abstractmethods__):
        raise UserError(f"reward {config.model}: {place} does not define {', '.join(missing)}")
    if config.question is not None and not found.asks_question:
        raise UserError(f"reward {config.model}: asks no question; remove `question`")
    if config.question is not None and config.question.questions and not found.has_questions:
        raise UserError(f"reward {config.model}: asks one question; remove `questions`")
    return found


def check_prompts(configs: Iterable[RewardConfig], prompts: Sequence[str]) -> None:
    """Checks that reward models can score images of ``prompts``, before any is loaded.

    Raises:
        UserError: a configuration is wrong, or its model cannot score a prompt; names the first.
    """
    for config in configs:
        for prompt, reason in reward_class(config).unscorable(config, prompts).items():
            raise UserError(f"reward {config.model}: cannot score the prompt {prompt!r}: {reason}")


def load_reward(config: RewardConfig, device: torch.device | str) -> BatchedReward:
    """Loads the reward model that ``config`` names.

    Raises:
        UserError: the name is not registered, or the weights cannot be loaded.
    """
    found = reward_class(config)
    with without_library_bars():
        reward = found.load(config, device)
    if not isinstance(reward, BatchedReward):
        raise UserError(
            f"reward {config.model}: {found.__name__}.load returned {type(reward).__name__}; "
            "return the reward"
        )
    folder = Path(config.source or "").expanduser()
    if config.source and folder.is_dir() and not reward.settings:
        names = ("*.json", "*.jinja", "*.txt")
        files = sorted({path for name in names for path in folder.rglob(name) if path.is_file()})
        reward.settings = {
            "files": {str(path.relative_to(folder)): sha256_file(path) for path in files}
        }
    return reward
