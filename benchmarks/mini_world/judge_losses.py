"""What the judges learn from: contrasts, preferences, and what each cell of a picture shows."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.mini_world.judge_data import CELL_CLASSES
from benchmarks.mini_world.small_rewards import SmallDualEncoder, SmallImageReward
from benchmarks.mini_world.world import GRAMMAR

MAX_LOGIT_SCALE = 60.0
FACTS_PER_UNIT = 8.0
"""So many facts weigh as much as one class of a cell."""
OTHER_GROUPS_SHARE = 0.25
"""Share of the steps in which captions of other groups are compared too."""
PREFERENCE_SCALE = 20.0
"""Cosine differences times this are the logits of a preference."""


@dataclass(frozen=True)
class Batch:
    """``B`` pictures in groups of ``group``: what they show, their captions, and worse copies.

    ``pixels`` ``[B, 3, 32, 32]``, ``ids`` ``[B, L]``, ``cells`` ``[B, cells, 3]``, ``facts``
    ``[B, facts]``; ``worse`` ``[B / group, 3, 32, 32]`` are degraded copies of the groups' first
    pictures.
    """

    pixels: Tensor
    ids: Tensor
    cells: Tensor
    facts: Tensor
    group: int
    worse: Tensor | None = None


class ContentHead(nn.Module):
    """Reads off feature vectors what a picture shows, in each cell and as facts.

    For training alone. The same facts are read off a caption's vector, for they are what captions
    speak of; those that it leaves open are a matter of likelihood. Learned this way, both towers
    know their subject, and put it in common terms, before they are matched with each other.
    """

    def __init__(self, picture_width: int, caption_width: int, facts: int) -> None:
        super().__init__()
        self.cells = nn.Linear(picture_width, GRAMMAR.cells * sum(CELL_CLASSES))
        self.picture_facts = nn.Linear(picture_width, facts)
        same = picture_width == caption_width
        self.caption_facts = self.picture_facts if same else nn.Linear(caption_width, facts)

    def picture_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Of pictures' summaries ``[B, picture_width]``: cross-entropy, summed per cell."""
        cells = self.cells(features).unflatten(1, (GRAMMAR.cells, -1))
        losses = [
            functional.cross_entropy(logits.flatten(0, 1), batch.cells[..., part].flatten())
            for part, logits in enumerate(cells.split(CELL_CLASSES, -1))
        ]
        return torch.stack(losses).sum() + _facts_loss(self.picture_facts(features), batch)

    def caption_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Of captions' vectors ``[B, caption_width]``."""
        return _facts_loss(self.caption_facts(features), batch)


def _facts_loss(logits: Tensor, batch: Batch) -> Tensor:
    loss = functional.binary_cross_entropy_with_logits(logits, batch.facts, reduction="sum")
    return loss / (FACTS_PER_UNIT * len(logits))


def contrastive_loss(
    judge: SmallDualEncoder, encoded: Tensor, captions: Tensor, batch: Batch
) -> Tensor:
    """CLIP's loss both ways. The batch holds, by its groups, captions and pictures that differ
    from each other in one attribute: without those a judge learns little but the colours."""
    images = functional.normalize(encoded, dim=-1)
    texts = functional.normalize(captions, dim=-1)
    logits = judge.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE) * images @ texts.T
    answers = torch.arange(len(logits))
    loss = functional.cross_entropy(logits, answers) + functional.cross_entropy(logits.T, answers)
    if batch.worse is None:
        return loss / 2
    worse = functional.normalize(judge.encode_image(batch.worse), dim=-1)
    margins = ((images - worse.repeat_interleave(batch.group, 0)) * texts).sum(-1)
    return loss / 2 + preference_loss(PREFERENCE_SCALE * margins[:: batch.group])


def preference_loss(margins: Tensor) -> Tensor:
    """Bradley-Terry: the negative log-likelihood that the first of two was preferred."""
    return -functional.logsigmoid(margins).mean()


def reward_loss(judge: SmallImageReward, encoded: Tensor, batch: Batch) -> Tensor:
    """Within each group, every picture picks its caption and every caption its picture; a score's
    level must mean the same for all, and now and then captions of other groups are compared."""
    number, group = len(encoded), batch.group
    index = torch.arange(number)
    first = index - index % group
    # ``scores[i, s]``: picture i with the caption ``s`` places further in its group.
    scores = torch.stack(
        [
            judge.pair_scores(encoded, batch.ids[first + (index + shift) % group])
            for shift in range(group)
        ],
        1,
    )
    # ``by_caption[j, s]``: caption j with the picture ``s`` places before it.
    by_caption = torch.stack(
        [scores[first + (index - shift) % group, shift] for shift in range(group)], 1
    )
    right, wrong = scores[:, 0], scores[:, 1:]
    answers = torch.zeros(number, dtype=torch.long)
    loss = functional.cross_entropy(scores, answers)
    loss = loss + functional.cross_entropy(by_caption, answers)
    loss = loss + 0.5 * (preference_loss(right) + preference_loss(-wrong))
    if torch.rand(()) < OTHER_GROUPS_SHARE:
        other = judge.pair_scores(encoded, batch.ids[index.roll(group)])
        loss = loss + preference_loss(right - other)
    if batch.worse is not None:
        worse = judge.pair_scores(judge.encode_image(batch.worse), batch.ids[::group])
        loss = loss + preference_loss(right[::group] - worse)
    return loss / 2
