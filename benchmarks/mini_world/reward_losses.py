"""Losses of the reward models: contrasts, preferences, and what each cell of a picture shows."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.mini_world.reward_data import CAPTION_CLASSES, CELL_CLASSES, UNSAID
from benchmarks.mini_world.small_rewards import SmallDualEncoder, SmallImageReward
from benchmarks.mini_world.world import GRAMMAR

MAX_LOGIT_SCALE = 60.0
FACTS_PER_UNIT = 8.0
"""This many facts weigh as much as one class of a cell."""
OTHER_GROUPS_SHARE = 0.25
"""Share of the steps that also compare captions of other groups."""
ALIGNMENT_SCALE = 20.0
"""Factor from cosines to logits of :func:`alignment_loss`."""
PREFERENCE_SCALE = 20.0
"""Factor from cosine differences to logits of a preference."""


@dataclass(frozen=True)
class Batch:
    """``B`` pictures in groups of ``group``, with their captions, contents and degraded copies.

    ``pixels`` ``[B, 3, 32, 32]``, ``ids`` ``[B, L]``, ``cells`` ``[B, cells, 3]``, ``facts``
    ``[B, facts]``, ``wording`` ``[B, len(CAPTION_CLASSES)]``; ``worse`` ``[B / group, 3, 32, 32]``
    are degraded copies of the groups' first pictures.
    """

    pixels: Tensor
    ids: Tensor
    cells: Tensor
    facts: Tensor
    wording: Tensor
    group: int
    worse: Tensor | None = None


class ContentHead(nn.Module):
    """Predicts the cells and facts of a picture from its features; used in training only.

    The same facts, and the caption's wording, are predicted from a caption's features, so both
    towers learn common terms before they are matched with each other.
    """

    def __init__(self, picture_width: int, caption_width: int, facts: int) -> None:
        super().__init__()
        self.cells = nn.Linear(picture_width, GRAMMAR.cells * sum(CELL_CLASSES))
        self.picture_facts = nn.Linear(picture_width, facts)
        same = picture_width == caption_width
        self.caption_facts = self.picture_facts if same else nn.Linear(caption_width, facts)
        self.wording = nn.Linear(caption_width, sum(CAPTION_CLASSES))

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
        losses = [
            functional.cross_entropy(logits, classes, ignore_index=UNSAID, reduction="sum")
            for logits, classes in zip(
                self.wording(features).split(CAPTION_CLASSES, -1), batch.wording.unbind(-1),
                strict=True,
            )
        ]  # fmt: skip
        wording = torch.stack(losses).sum() / len(features)
        return _facts_loss(self.caption_facts(features), batch) + wording


def _facts_loss(logits: Tensor, batch: Batch) -> Tensor:
    loss = functional.binary_cross_entropy_with_logits(logits, batch.facts, reduction="sum")
    return loss / (FACTS_PER_UNIT * len(logits))


def contrastive_loss(
    model: SmallDualEncoder, encoded: Tensor, captions: Tensor, batch: Batch
) -> Tensor:
    """CLIP's symmetric loss.

    Pictures and captions of a group differ in one attribute; without such hard negatives a model
    learns little but colours.
    """
    images = functional.normalize(encoded, dim=-1)
    texts = functional.normalize(captions, dim=-1)
    loss = symmetric_loss(model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE) * images @ texts.T)
    if batch.worse is None:
        return loss
    worse = functional.normalize(model.encode_image(batch.worse), dim=-1)
    margins = ((images - worse.repeat_interleave(batch.group, 0)) * texts).sum(-1)
    return loss + preference_loss(PREFERENCE_SCALE * margins[:: batch.group])


def symmetric_loss(logits: Tensor) -> Tensor:
    """Cross-entropy over the rows and the columns of ``logits`` [B, B]; the diagonal is right."""
    answers = torch.arange(len(logits))
    loss = functional.cross_entropy(logits, answers) + functional.cross_entropy(logits.T, answers)
    return loss / 2


def alignment_loss(encoded: Tensor, captions: Tensor) -> Tensor:
    """BLIP's contrast of the image's first token with the caption read without a picture.

    Once the two agree, attention can compare them; without it the model does not learn relations.
    """
    images = functional.normalize(encoded[:, 0], dim=-1)
    return symmetric_loss(ALIGNMENT_SCALE * images @ functional.normalize(captions, dim=-1).T)


def preference_loss(margins: Tensor) -> Tensor:
    """Bradley-Terry negative log-likelihood of preferring the first of two."""
    return -functional.logsigmoid(margins).mean()


def reward_loss(model: SmallImageReward, encoded: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy within each group, of captions given pictures and pictures given captions.

    Preferences keep scores on one level, sometimes against captions of other groups.
    """
    number, group = len(encoded), batch.group
    index = torch.arange(number)
    first = index - index % group
    # ``scores[i, s]``: picture i with the caption ``s`` places further in its group.
    scores = torch.stack(
        [
            model.pair_scores(encoded, batch.ids[first + (index + shift) % group])
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
        other = model.pair_scores(encoded, batch.ids[index.roll(group)])
        loss = loss + preference_loss(right - other)
    if batch.worse is not None:
        worse = model.pair_scores(model.encode_image(batch.worse), batch.ids[::group])
        loss = loss + preference_loss(right[::group] - worse)
    return loss / 2
