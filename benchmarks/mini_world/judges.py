"""Trains the small judges in the roles of HPS, CLIP score, PickScore and ImageReward.

They differ in architecture, seed, augmentation and loss. Training has two parts: pictures alone
(what does each cell show?), then pictures with captions; those in the role of a preference model
also see degraded copies of pictures, to like less.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from scipy.stats import rankdata
from torch import Tensor

from benchmarks.mini_world.judge_data import (
    Augmentation,
    JudgePool,
    degrade,
    draw_judge_pool,
    load_autoencoder,
    to_images,
    to_pixels,
)
from benchmarks.mini_world.judge_losses import Batch, ContentHead, contrastive_loss, reward_loss
from benchmarks.mini_world.progress import TrainingProgress
from benchmarks.mini_world.tokenizers import words
from benchmarks.small_rewards import (
    PAD_ID,
    SmallCLIPScore,
    SmallDualEncoder,
    SmallHPS,
    SmallImageReward,
    SmallPickScore,
    SmallReward,
    normalise,
)
from g2rpo.config import StrictModel
from g2rpo.files import atomic_folder
from g2rpo.rewards.base import RewardConfig, RewardModel
from g2rpo.rewards.registry import load_reward

GROUP = 3
"""Scenes in a training group."""
LENGTH_BINS = 4
"""Batches are drawn so many at a time, sorted by length, and one of them is used."""


class JudgeSettings(StrictModel):
    """Training of one judge."""

    picture_steps: int = Field(default=600, ge=0)
    """Steps on pictures alone."""
    caption_steps: int = Field(default=1600, ge=1)
    """Steps on pictures with captions."""
    groups: int = Field(default=64, ge=2)
    """Groups in a batch."""
    learning_rate: float = Field(default=2e-3, gt=0)
    content_weight: float = Field(default=0.3, ge=0)
    """Weight of the question what each cell shows, beside the captions."""
    preferences: bool = True
    """Whether degraded copies of pictures are shown as the worse ones."""
    augmentation: Augmentation = Augmentation()


class JudgesSettings(StrictModel):
    """Training of all judges."""

    groups: int = Field(default=20000, ge=1)
    """Groups of scenes in the training pool, which the judges share."""
    held_out: int = Field(default=500, ge=1)
    """Held-out pictures, each with four captions that differ in one attribute from its own."""
    hps: JudgeSettings = JudgeSettings()
    clip: JudgeSettings = JudgeSettings(
        preferences=False, augmentation=Augmentation(noise=0.03, brightness=0.06, decoded=0.5)
    )
    pick_score: JudgeSettings = JudgeSettings(
        augmentation=Augmentation(noise=0.06, brightness=0.03, blur=0.5, decoded=0.7)
    )
    image_reward: JudgeSettings = JudgeSettings(
        augmentation=Augmentation(noise=0.04, brightness=0.05, blur=0.4, decoded=0.6)
    )


MODELS: dict[str, Callable[[Sequence[str]], SmallReward]] = {
    "hps": SmallHPS,
    "clip": SmallCLIPScore,
    "pick_score": SmallPickScore,
    "image_reward": SmallImageReward,
}


def train_judges(
    assets: Path,
    seed: int,
    settings: JudgesSettings | None = None,
    roles: Sequence[str] = tuple(MODELS),
) -> dict[str, Any]:
    """Trains the judges of ``roles`` and saves them to ``assets/rewards/<role>``.

    Pictures also pass through the autoencoder at ``assets/policy/vae``, which must be trained.

    Returns:
        For each role its settings, size and quality on held-out decoded pictures.
    """
    settings = settings or JudgesSettings()
    vae = load_autoencoder(assets)
    pool = draw_judge_pool(seed, "judge", settings.groups, GROUP, vae)
    held_out = draw_judge_pool(seed, "test", settings.held_out, 5, vae)
    report: dict[str, Any] = {}
    for role in roles:
        start = time.monotonic()
        torch.manual_seed(seed * 1000 + 17 * (1 + list(MODELS).index(role)))
        chosen: JudgeSettings = getattr(settings, role)
        judge = train_judge(MODELS[role](words()), chosen, pool)
        folder = assets / "rewards" / role
        with atomic_folder(folder) as temporary:
            judge.save(temporary)
        reward = load_reward(RewardConfig(model=role, source=str(folder), batch_size=256), "cpu")
        report[role] = {
            "settings": chosen.model_dump(mode="json"),
            "parameters": sum(p.numel() for p in judge.parameters()),
            "seconds": round(time.monotonic() - start),
            **judge_quality(reward, held_out),
        }
    return report


def train_judge(judge: SmallReward, settings: JudgeSettings, pool: JudgePool) -> SmallReward:
    """Trains ``judge`` on ``pool`` in place, and returns it in evaluation mode."""
    ids = torch.stack([judge.tokenize(captions) for captions in pool.captions])
    head = ContentHead(judge.width)
    steps = settings.picture_steps + settings.caption_steps
    parameters = [*judge.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, steps, pct_start=0.1
    )
    judge.train()
    with TrainingProgress(f"judge {judge.name}", steps) as progress:
        for step in range(steps):
            with_captions = step >= settings.picture_steps
            batch = _draw_batch(pool, ids, settings, with_captions)
            encoded = judge.encode_image(batch.pixels)
            loss = content = head(judge.summary(encoded), batch)
            if with_captions:
                loss = settings.content_weight * content + _caption_loss(judge, encoded, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            progress.update(step + 1, f"loss {loss.item():.3f}, content {content.item():.3f}")
    return judge.eval()


def _caption_loss(judge: SmallReward, encoded: Tensor, batch: Batch) -> Tensor:
    if isinstance(judge, SmallDualEncoder):
        return contrastive_loss(judge, encoded, batch)
    assert isinstance(judge, SmallImageReward)
    return reward_loss(judge, encoded, batch)


def _draw_batch(
    pool: JudgePool, ids: Tensor, settings: JudgeSettings, with_captions: bool
) -> Batch:
    # Captions of about the same length go together, for padding costs as much as words.
    drawn = torch.randint(len(pool), (LENGTH_BINS * settings.groups,))
    lengths = (ids[drawn] != PAD_ID).sum(-1).amax(-1)
    chosen = drawn[lengths.argsort()].chunk(LENGTH_BINS)[int(torch.randint(LENGTH_BINS, ()))]
    texts = ids[chosen].flatten(0, 1)
    rendered, decoded = pool.rendered[chosen].flatten(0, 1), pool.decoded[chosen].flatten(0, 1)
    pixels = settings.augmentation(rendered, decoded)
    worse = None
    if settings.preferences and with_captions:
        worse = normalise(degrade(pixels[::GROUP]))
    return Batch(
        pixels=normalise(pixels),
        ids=texts[:, : int((texts != PAD_ID).sum(-1).max())],
        cells=pool.cells[chosen].flatten(0, 1),
        backgrounds=pool.backgrounds[chosen].flatten(),
        group=GROUP,
        worse=worse,
    )


def judge_quality(reward: RewardModel, pool: JudgePool) -> dict[str, float]:
    """How well ``reward`` tells a picture's caption from those that differ in one attribute.

    ``auc`` is the chance that a picture's own caption gets the higher score of the two, over
    pictures and altered captions; ``auc_pooled`` compares across pictures too, which also asks
    for a score's level to mean the same everywhere; ``_rendered`` is without the autoencoder.
    ``degraded_auc`` is the chance that a degraded copy of a picture gets the lower score.
    """
    own, altered = _scores(reward, pool.decoded[:, 0], pool)
    own_rendered, altered_rendered = _scores(reward, pool.rendered[:, 0], pool)
    first = [captions[0] for captions in pool.captions]
    torch.manual_seed(0)
    degraded = reward.score(to_images(degrade(to_pixels(pool.decoded[:, 0]))), first)
    return {
        "auc": _paired_auc(own, altered),
        "auc_pooled": _pooled_auc(own, altered),
        "auc_rendered": _paired_auc(own_rendered, altered_rendered),
        "degraded_auc": _paired_auc(own, degraded[:, None]),
        "score_mean": round(own.mean().item(), 4),
        "score_std": round(own.std().item(), 4),
    }


def _scores(reward: RewardModel, images: Tensor, pool: JudgePool) -> tuple[Tensor, Tensor]:
    """Scores ``[N]`` of images with their own captions and ``[N, G - 1]`` with the altered."""
    members = len(pool.captions[0])
    columns = [reward.score(images, [c[i] for c in pool.captions]) for i in range(members)]
    return columns[0], torch.stack(columns[1:], 1)


def _paired_auc(own: Tensor, altered: Tensor) -> float:
    difference = own[:, None] - altered
    wins = (difference > 0).float() + 0.5 * (difference == 0).float()
    return round(wins.mean().item(), 4)


def _pooled_auc(own: Tensor, altered: Tensor) -> float:
    positives, negatives = len(own), altered.numel()
    ranks = rankdata(torch.cat([own, altered.flatten()]).numpy())
    excess = float(ranks[:positives].sum()) - positives * (positives + 1) / 2
    return round(excess / (positives * negatives), 4)
