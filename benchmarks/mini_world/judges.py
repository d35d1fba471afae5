"""Trains the small judges in the roles of HPS, CLIP score, PickScore and ImageReward.

They differ in architecture, seed, augmentation and loss. Training has two parts: pictures alone
and captions alone (what does each cell show?), then pictures matched with captions; those in the
role of a preference model also see degraded copies of pictures, to like less.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from scipy.stats import rankdata
from torch import Tensor

from benchmarks.mini_world import autoencoder, world
from benchmarks.mini_world.judge_data import (
    Augmentation,
    JudgePool,
    decode_share,
    degrade,
    draw_judge_pool,
    facts_of,
    to_images,
    to_pixels,
)
from benchmarks.mini_world.judge_losses import Batch, ContentHead, contrastive_loss, reward_loss
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
from g2rpo.config import StrictModel
from g2rpo.files import atomic_folder
from g2rpo.progress import ProgressReport
from g2rpo.rewards.base import RewardConfig, RewardModel
from g2rpo.rewards.registry import load_reward

GROUP = 3
"""Scenes in a training group."""
HELD_OUT_GROUP = 5
LENGTH_BINS = 4
"""Batches are drawn so many at a time, sorted by length, and one of them is used."""


class JudgeSettings(StrictModel):
    """Training of one judge."""

    content_steps: int = Field(default=600, ge=0)
    """Steps in which pictures and captions are understood, each alone."""
    matching_steps: int = Field(default=1400, ge=1)
    """Steps in which they are matched."""
    groups: int = Field(default=40, ge=2)
    """Groups in a batch."""
    learning_rate: float = Field(default=2e-3, gt=0)
    content_weight: float = Field(default=0.3, ge=0)
    """Weight of the question what each cell shows, beside the captions."""
    preferences: bool = True
    """Whether degraded copies of pictures are shown as the worse ones."""
    augmentation: Augmentation = Augmentation()


class PictureSettings(StrictModel):
    """The pictures and captions that all judges learn from and are measured on."""

    groups: int = Field(default=16000, ge=1)
    """Groups of scenes in the training pool."""
    decoded_share: float = Field(default=0.6, ge=0, le=1)
    """Share of the pool's pictures that pass through the autoencoder."""
    latent_noise: float = Field(default=0.3, ge=0)
    """Largest standard deviation of noise in their normalised latents."""
    held_out: int = Field(default=500, ge=1)
    """Held-out pictures, each with four captions that differ in one attribute from its own."""


SETTINGS: dict[str, JudgeSettings] = {
    "hps": JudgeSettings(content_steps=500, matching_steps=2000),
    "clip": JudgeSettings(
        content_steps=500,
        matching_steps=1900,
        preferences=False,
        augmentation=Augmentation(noise=0.03, brightness=0.06),
    ),
    "pick_score": JudgeSettings(
        content_steps=500,
        matching_steps=2000,
        augmentation=Augmentation(noise=0.06, brightness=0.03, blur=0.5),
    ),
    "image_reward": JudgeSettings(
        content_steps=800,
        matching_steps=3600,
        augmentation=Augmentation(noise=0.04, brightness=0.05, blur=0.4),
    ),
}
"""How the judge of each role is trained."""

MODELS: dict[str, Callable[[Sequence[str]], SmallReward]] = {
    "hps": SmallHPS,
    "clip": SmallCLIPScore,
    "pick_score": SmallPickScore,
    "image_reward": SmallImageReward,
}


def build_judge(
    role: str, assets: Path, seed: int, settings: JudgeSettings, pictures: PictureSettings
) -> dict[str, Any]:
    """Trains the judge of ``role`` and saves it to ``assets/rewards/<role>``.

    Pictures also pass through the autoencoder at ``assets/policy/vae``, which must be trained.

    Returns:
        its size, and its quality on held-out pictures.
    """
    vae = autoencoder.load(assets)
    pool = draw_judge_pool(seed, "judge", pictures.groups, GROUP)
    pool = decode_share(pool, vae, pictures.decoded_share, pictures.latent_noise, seed)
    torch.manual_seed(seed * 1000 + 17 * (1 + list(MODELS).index(role)))
    judge = train_judge(MODELS[role](words()), settings, pool)
    folder = assets / "rewards" / role
    with atomic_folder(folder) as temporary:
        judge.save(temporary)
    reward = load_reward(RewardConfig(model=role, source=str(folder), batch_size=256), "cpu")
    held_out = draw_judge_pool(seed, "test", pictures.held_out, HELD_OUT_GROUP)
    decoded = decode_share(held_out, vae, 1.0, 0.0, seed)
    parameters = sum(parameter.numel() for parameter in judge.parameters())
    return {"parameters": parameters} | judge_quality(reward, decoded, held_out)


def train_judge(judge: SmallReward, settings: JudgeSettings, pool: JudgePool) -> SmallReward:
    """Trains ``judge`` on ``pool`` in place, and returns it in evaluation mode."""
    ids = torch.stack([judge.tokenize(captions) for captions in pool.captions])
    material = _Material(pool, ids, facts_of(pool))
    head = ContentHead(judge.width, judge.caption_width, material.facts.shape[-1])
    steps = settings.content_steps + settings.matching_steps
    parameters = [*judge.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, steps, pct_start=0.1
    )
    judge.train()
    with ProgressReport(f"judge {judge.name}", steps) as progress:
        for step in range(steps):
            matching = step >= settings.content_steps
            batch = _draw_batch(material, settings, matching)
            encoded = judge.encode_image(batch.pixels)
            captions = judge.encode_caption(batch.ids)
            content = head.picture_loss(judge.summary(encoded), batch)
            content = content + head.caption_loss(captions, batch)
            loss = content
            if matching:
                match = _matching_loss(judge, encoded, captions, batch)
                loss = settings.content_weight * content + match
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            progress.update(step + 1, f"loss {loss.item():.3f}, content {content.item():.3f}")
    return judge.eval()


def _matching_loss(judge: SmallReward, encoded: Tensor, captions: Tensor, batch: Batch) -> Tensor:
    if isinstance(judge, SmallDualEncoder):
        return contrastive_loss(judge, encoded, captions, batch)
    assert isinstance(judge, SmallImageReward)
    return reward_loss(judge, encoded, batch)


@dataclass(frozen=True)
class _Material:
    """What one judge is trained on: the pool, its captions as the judge's tokens, and its facts."""

    pool: JudgePool
    ids: Tensor
    facts: Tensor


def _draw_batch(material: _Material, settings: JudgeSettings, matching: bool) -> Batch:
    pool, ids = material.pool, material.ids
    # Captions of about the same length go together, for padding costs as much as words.
    drawn = torch.randint(len(pool), (LENGTH_BINS * settings.groups,))
    lengths = (ids[drawn] != PAD_ID).sum(-1).amax(-1)
    chosen = drawn[lengths.argsort()].chunk(LENGTH_BINS)[int(torch.randint(LENGTH_BINS, ()))]
    texts = ids[chosen].flatten(0, 1)
    pixels = settings.augmentation(pool.images[chosen].flatten(0, 1))
    worse = None
    if settings.preferences and matching:
        worse = normalise(degrade(pixels[::GROUP]))
    return Batch(
        pixels=normalise(pixels),
        ids=texts[:, : int((texts != PAD_ID).sum(-1).max())],
        cells=pool.cells[chosen].flatten(0, 1),
        facts=material.facts[chosen].flatten(0, 1).float(),
        group=GROUP,
        worse=worse,
    )


def judge_quality(reward: RewardModel, decoded: JudgePool, rendered: JudgePool) -> dict[str, Any]:
    """How well ``reward`` tells a picture's caption from those that differ in one attribute.

    ``auc`` is the chance that a picture's own caption gets the higher score of the two, over
    decoded pictures and altered captions; ``auc_pooled`` compares across pictures too, which also
    asks for a score's level to mean the same everywhere; ``auc_rendered`` is that of pictures
    that did not pass through the autoencoder. ``degraded_auc`` is the chance that a degraded copy
    of a picture gets the lower score. ``auc_by_attribute`` is ``auc`` for each altered attribute,
    and ``auc_without_relations`` is that over all attributes of single shapes and the background.
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


def _scores(reward: RewardModel, pool: JudgePool) -> tuple[Tensor, Tensor]:
    """Scores ``[N]`` of the groups' first images with their own captions, and ``[N, G - 1]``."""
    columns = [
        reward.score(pool.images[:, 0], captions) for captions in zip(*pool.captions, strict=True)
    ]
    return columns[0], torch.stack(columns[1:], 1)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _wins_by_attribute(own: Tensor, altered: Tensor, pool: JudgePool) -> dict[str, list[float]]:
    scenes = [[world.scene_of(text) for text in captions] for captions in pool.captions]
    kinds = [[world.altered_attribute(first, other) for other in rest] for first, *rest in scenes]
    wins = ((own[:, None] > altered).float() + 0.5 * (own[:, None] == altered).float()).tolist()
    found: dict[str, list[float]] = {}
    for names, values in zip(kinds, wins, strict=True):
        for name, value in zip(names, values, strict=True):
            found.setdefault(name, []).append(value)
    return found


def _paired_auc(own: Tensor, altered: Tensor) -> float:
    difference = own[:, None] - altered
    wins = (difference > 0).float() + 0.5 * (difference == 0).float()
    return round(wins.mean().item(), 4)


def _pooled_auc(own: Tensor, altered: Tensor) -> float:
    positives, negatives = len(own), altered.numel()
    ranks = rankdata(torch.cat([own, altered.flatten()]).numpy())
    excess = float(ranks[:positives].sum()) - positives * (positives + 1) / 2
    return round(excess / (positives * negatives), 4)
