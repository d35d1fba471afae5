"""The aesthetic score of LAION's improved predictor: a linear head on CLIP ViT-L/14.

The head ``sac+logos+ava1-l14-linearMSE`` was fitted to people's ratings of pictures from 1 to 10.
It reads the image's features at unit length; the prompt does not matter.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPVisionModelWithProjection

from g2rpo.files import read_json, sha256_files
from g2rpo.hub.fetch import fetched_file
from g2rpo.rewards.base import BatchedReward, RewardConfig, choose_variant
from g2rpo.rewards.image_reward import linear_head
from g2rpo.rewards.pick_score import locate_clip, read_preprocessing
from g2rpo.rewards.weights import load_state, read_weights

PUBLISHED_CLIP = "openai/clip-vit-large-patch14"
HEAD = "sac+logos+ava1-l14-linearMSE"
HEAD_ARTIFACT = "aesthetic-head"
# In the file of a whole CLIP, but not needed.
_UNUSED = (
    "logit_scale",
    "text_model.",
    "text_projection.",
    "vision_model.embeddings.position_ids",
)


class AestheticScore(BatchedReward):
    """About 1 to 10, whatever the prompt.

    ``source`` is the CLIP model, whose folder may contain the head as ``HEAD.pth``; the published
    head is used otherwise.
    """

    name = "aesthetic"

    def __init__(
        self, folder: Path, weights: Path, head: Path, device: torch.device | str, batch_size: int
    ) -> None:
        super().__init__(device, batch_size, HEAD, sha256_files([weights, head]))
        config = CLIPConfig.from_dict(read_json(folder / "config.json"))
        config.vision_config.projection_dim = config.projection_dim
        self.clip = CLIPVisionModelWithProjection(config.vision_config)
        load_state(self.clip, read_weights(weights), weights, _UNUSED)
        self.head = linear_head(config.projection_dim)
        layers = {key.removeprefix("layers."): value for key, value in read_weights(head).items()}
        load_state(self.head, layers, head)
        self.clip.to(self.device)
        self.head.to(self.device)
        self.preprocessing = read_preprocessing(folder / "preprocessor_config.json")

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """Loads the model; see :meth:`BatchedReward.load`."""
        choose_variant(config, (HEAD,))
        source = config.source or PUBLISHED_CLIP
        own = Path(source) / f"{HEAD}.pth"
        head = own if own.is_file() else fetched_file(HEAD_ARTIFACT)
        weights, folder = locate_clip(source, config.revision)
        return cls(folder, weights, head, device, config.batch_size)

    def prepare(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return self.preprocessing(images)

    def evaluate(self, prepared: Tensor) -> Tensor:
        """Scores ``[B]``."""
        features = self.clip(pixel_values=prepared.to(self.device)).image_embeds
        scores: Tensor = self.head(nn.functional.normalize(features, dim=-1)).squeeze(-1)
        return scores
