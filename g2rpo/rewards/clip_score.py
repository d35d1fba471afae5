"""CLIP score: the cosine of image and text features of DFN5B-CLIP-ViT-H-14 (arXiv 2309.17425)."""

from typing import Self

import open_clip
import torch

from g2rpo.errors import UserError
from g2rpo.rewards.base import RewardConfig, choose_variant
from g2rpo.rewards.open_clip_reward import (
    WEIGHTS_FILES,
    ClipFiles,
    OpenClipReward,
    clip_folder,
)
from g2rpo.rewards.preprocessing import Preprocessing
from g2rpo.rewards.weights import locate

# Variant (input size in pixels) -> hub id and open_clip's name of the architecture.
PUBLISHED = {
    "224": ("apple/DFN5B-CLIP-ViT-H-14", "ViT-H-14-quickgelu"),
    "378": ("apple/DFN5B-CLIP-ViT-H-14-378", "ViT-H-14-378-quickgelu"),
}


class CLIPScore(OpenClipReward):
    """Cosine in [-1, 1], not multiplied by 100 or clipped at 0.

    Without a ``source``, ``variant`` selects the published input size, 224 (default) or 378. Any
    other open_clip model is loaded from the folder or hub id with its ``open_clip_config.json``; it
    has no variants.
    """

    name = "clip"

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """Loads the model; see :meth:`BatchedReward.load`."""
        if config.source is not None:
            if config.variant is not None:
                raise UserError(f"reward clip: {config.source} has no variants; remove `variant`")
            files = clip_folder(config.source, config.revision)
            return cls(files, "cosine", device, config.batch_size)
        variant = choose_variant(config, tuple(PUBLISHED))
        source, architecture = PUBLISHED[variant]
        weights = locate(source, WEIGHTS_FILES[::-1], config.revision)
        model_config = open_clip.get_model_config(architecture)
        size = int(model_config["vision_cfg"]["image_size"])
        preprocess = open_clip.get_pretrained_cfg(architecture, "dfn5b")
        preprocessing = Preprocessing.from_open_clip(preprocess, size, source)
        files = ClipFiles(model_config, preprocessing, weights)
        return cls(files, f"dfn5b-{variant}-cosine", device, config.batch_size)
