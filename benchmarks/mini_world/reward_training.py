"""Trains the small counterparts of HPS, CLIP score, PickScore and ImageReward.

They differ in architecture, seed, augmentation and loss. Training has three phases: captions alone
(what do they say?), pictures and captions side by side (what does each cell show?), then pictures
matched with captions. The preference models also learn to score degraded copies of pictures lower.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from scipy.stats import mannwhitneyu
from torch import Tensor

from benchmarks.mini_world import autoencoder, world
from benchmarks.mini_world.reward_data import (
    Augmentation,
    GroupPool,
    decode_share,
    degrade,
    draw_group_pool,
    facts_of,
    to_images,
    to_pixels,
    wording_of,
)
from benchmarks.mini_world.reward_losses import (
    Batch,
    ContentHead,
    alignment_loss,
    contrastive_loss,
    reward_loss,
)
from benchmarks.mini_world.small_rewards import (
    PAD_ID,
    SmallCLIPScore,
    SmallDualEncoder,
    SmallHPS,
    SmallImageReward,
    SmallPickScore,
    SmallReward,
    normalise,
)
from benchmarks.mini_world.tokenizers import words
from benchmarks.mini_world.training import OneCycle
from g2rpo.config import StrictModel
from g2rpo.files import atomic_folder
from g2rpo.progress import ProgressReport
from g2rpo.rewards.base import RewardConfig, RewardModel
from g2rpo.rewards.registry import load_reward

GROUP = 3
"""Scenes in a training group."""
HELD_OUT_GROUP = 5
LENGTH_BINS = 4
"""Batches are cut from so many times their size, sorted by caption length."""


class RewardSettings(StrictModel):
    """Training of one reward model."""

    caption_steps: int = Field(default=800, ge=0)
    """Steps of the first phase: captions alone."""
    content_steps: int = Field(default=500, ge=0)
    """Steps of the second phase: pictures and captions side by side."""
    matching_steps: int = Field(default=2400, ge=1)
    """Steps of the third phase: pictures matched with captions."""
    groups: int = Field(default=32, ge=2)
    """Groups per batch."""
    learning_rate: float = Field(default=2e-3, gt=0)
    content_weight: float = Field(default=0.3, ge=0)
    """Weight of the second phase's loss in the third."""
    preferences: bool = True
    """Whether to train on preferences against degraded copies of pictures."""
    augmentation: Augmentation = Augmentation()


class PictureSettings(StrictModel):
    """The pictures and captions that all reward models are trained and evaluated on."""

    groups: int = Field(default=10000, ge=1)
    """Groups of scenes in the training pool."""
    decoded_share: float = Field(default=0.6, ge=0, le=1)
    """Share of the pool's pictures that are encoded and decoded by the autoencoder."""
    latent_noise: float = Field(default=0.3, ge=0)
    """Largest standard deviation of the noise on their normalised latents."""
    held_out: int = Field(default=500, ge=1)
    """Held-out pictures, each with four captions that differ from its own in one attribute."""


SETTINGS: dict[str, RewardSettings] = {
    "hps": RewardSettings(matching_steps=2000),
    "clip": RewardSettings(
        matching_steps=2200,
        preferences=False,
        augmentation=Augmentation(noise=0.03, brightness=0.06),
    ),
    "pick_score": RewardSettings(
        augmentation=Augmentation(noise=0.06, brightness=0.03, blur=0.5),
    ),
    "image_reward": RewardSettings(
        content_steps=600,
        matching_steps=1700,
        groups=24,
        augmentation=Augmentation(noise=0.04, brightness=0.05, blur=0.4),
    ),
}
"""Training of the counterpart of each published reward model."""

MODELS: dict[str, Callable[[Sequence[str]], SmallReward]] = {
    "hps": SmallHPS,
    "clip": SmallCLIPScore,
    "pick_score": SmallPickScore,
    "image_reward": SmallImageReward,
}


def build_reward(
    role: str, assets: Path, seed: int, settings: RewardSettings, pictures: PictureSettings
) -> dict[str, Any]:
    """Trains the counterpart of ``role`` and saves it to ``assets/rewards/<role>``.

    Needs the trained autoencoder in ``assets/policy/vae``.

    Returns:
        Its number of parameters and its quality on held-out pictures.
    """
    vae = autoencoder.load(assets)
    pool = draw_group_pool(seed, "judge", pictures.groups, GROUP)
    pool = decode_share(pool, vae, pictures.decoded_share, pictures.latent_noise, seed)
    torch.manual_seed(seed * 1000 + 17 * (1 + list(MODELS).index(role)))
    model = train_reward(MODELS[role](words()), settings, pool)
    folder = assets / "rewards" / role
    with atomic_folder(folder) as temporary:
        model.save(temporary)
    reward = load_reward(RewardConfig(model=role, source=str(folder), batch_size=256), "cpu")
    held_out = draw_group_pool(seed, "test", pictures.held_out, HELD_OUT_GROUP)
    decoded = decode_share(held_out, vae, 1.0, 0.0, seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters} | reward_quality(reward, decoded, held_out)


def train_reward(model: SmallReward, settings: RewardSettings, pool: GroupPool) -> SmallReward:
    """Trains ``model`` on ``pool`` in place and returns it in evaluation mode."""
    targets = Targets(
        torch.stack([model.tokenize(captions) for captions in pool.captions]),
        facts_of(pool),
        wording_of(pool),
    )
    head = ContentHead(model.width, model.caption_width, targets.facts.shape[-1])
    pictures_from = settings.caption_steps
    matching_from = pictures_from + settings.content_steps
    steps = matching_from + settings.matching_steps
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = OneCycle(
        parameters, settings.learning_rate, steps, 0.1,
        betas=(0.9, 0.98), weight_decay=0.01, fused=True,
    )  # fmt: skip
    model.train()
    with ProgressReport(f"reward {model.name}", steps) as progress:
        for step in range(steps):
            matching = step >= matching_from
            batch = _draw_batch(pool, targets, settings, matching)
            captions = model.encode_caption(batch.ids)
            content = head.caption_loss(captions, batch)
            if step >= pictures_from:
                encoded = model.encode_image(batch.pixels)
                content = content + head.picture_loss(model.summary(encoded), batch)
                if isinstance(model, SmallImageReward):
                    content = content + alignment_loss(encoded, captions)
            loss = content
            if matching:
                match = _matching_loss(model, encoded, captions, batch)
                loss = settings.content_weight * content + match
            optimizer.step(loss)
            progress.update(step + 1, f"loss {loss.item():.3f}, content {content.item():.3f}")
    return model.eval()


def _matching_loss(model: SmallReward, encoded: Tensor, captions: Tensor, batch: Batch) -> Tensor:
    if isinstance(model, SmallDualEncoder):
        return contrastive_loss(model, encoded, captions, batch)
    assert isinstance(model, SmallImageReward)
    return reward_loss(model, encoded, batch)


@dataclass(frozen=True)
class Targets:
    """Token ids ``[N, G, L]`` of a pool's captions, and its facts and wording."""

    ids: Tensor
    facts: Tensor
    wording: Tensor


def _draw_batch(
    pool: GroupPool, targets: Targets, settings: RewardSettings, matching: bool
) -> Batch:
    # Captions of similar length go together: padding costs as much as words.
    drawn = torch.randint(len(pool), (LENGTH_BINS * settings.groups,))
    lengths = (targets.ids[drawn] != PAD_ID).sum(-1).amax(-1)
    chosen = drawn[lengths.argsort()].chunk(LENGTH_BINS)[int(torch.randint(LENGTH_BINS, ()))]
    texts = targets.ids[chosen].flatten(0, 1)
    pixels = settings.augmentation(pool.images[chosen].flatten(0, 1))
    worse = None
    if settings.preferences and matching:
        worse = normalise(degrade(pixels[::GROUP]))
    return Batch(
        pixels=normalise(pixels),
        ids=texts[:, : int((texts != PAD_ID).sum(-1).max())],
        cells=pool.cells[chosen].flatten(0, 1),
        facts=targets.facts[chosen].flatten(0, 1).float(),
        wording=targets.wording[chosen].flatten(0, 1),
        group=GROUP,
        worse=worse,
    )


def reward_quality(reward: RewardModel, decoded: GroupPool, rendered: GroupPool) -> dict[str, Any]:
    """How well ``reward`` separates a picture's caption from those that differ in one attribute.

    ``auc`` is the probability that a decoded picture's own caption scores higher than an altered
    one; ``auc_pooled`` compares across pictures too, so scores must share one level;
    ``auc_rendered`` uses pictures that did not pass through the autoencoder. ``degraded_auc`` is
    the probability that a degraded copy of a picture scores lower. ``auc_by_attribute`` is ``auc``
    for each altered attribute, ``auc_without_relations`` for all of them but relations.
    """
    own, altered = _scores(reward, decoded)
    wins = _wins_by_attribute(own, altered, decoded)
    single = [win for name, found in wins.items() if name != "relation" for win in found]
    own_rendered, altered_rendered = _scores(reward, rendered)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        worse = to_images(degrade(to_pixels(decoded.images[:, 0])))
    degraded = reward.score(worse, [captions[0] for captions in decoded.captions])
    return {
        "auc": _paired_auc(own, altered),
        "auc_by_attribute": {name: _mean(found) for name, found in sorted(wins.items())},
        "auc_without_relations": _mean(single),
        "auc_pooled": _pooled_auc(own, altered),
        "auc_rendered": _paired_auc(own_rendered, altered_rendered),
        "degraded_auc": _paired_auc(own, degraded[:, None]),
        "score_mean": round(own.mean().item(), 4),
        "score_std": round(own.std().item(), 4),
    }


def _scores(reward: RewardModel, pool: GroupPool) -> tuple[Tensor, Tensor]:
    """Scores ``[N]`` of the groups' first images with their own captions, and ``[N, G - 1]``."""
    columns = [
        reward.score(pool.images[:, 0], captions) for captions in zip(*pool.captions, strict=True)
    ]
    return columns[0], torch.stack(columns[1:], 1)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _wins_by_attribute(own: Tensor, altered: Tensor, pool: GroupPool) -> dict[str, list[float]]:
    scenes = [[world.scene_of(text) for text in captions] for captions in pool.captions]
    kinds = [[world.altered_attribute(first, other) for other in rest] for first, *rest in scenes]
    wins = _wins(own, altered).tolist()
    found: dict[str, list[float]] = {}
    for names, values in zip(kinds, wins, strict=True):
        for name, value in zip(names, values, strict=True):
            found.setdefault(name, []).append(value)
    return found


def _wins(own: Tensor, altered: Tensor) -> Tensor:
    """1 where ``own`` [N] scores higher than ``altered`` [N, M], 1/2 where they tie."""
    return (own[:, None] > altered).float() + 0.5 * (own[:, None] == altered).float()


def _paired_auc(own: Tensor, altered: Tensor) -> float:
    return round(_wins(own, altered).mean().item(), 4)


def _pooled_auc(own: Tensor, altered: Tensor) -> float:
    higher = mannwhitneyu(own.numpy(), altered.flatten().numpy()).statistic
    return round(float(higher) / (len(own) * altered.numel()), 4)
