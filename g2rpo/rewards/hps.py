"""HPS v2: human preference score, a preference-tuned CLIP ViT-H-14 (arXiv 2306.09341).

The score is the diagonal of ``image_features @ text_features.T`` with normalised features, as in
hpsv2's ``score``. That package vendors open_clip's model and reloads it for every call; here
open_clip itself loads the published checkpoint once.
"""

from pathlib import Path
from typing import Self

import open_clip
import torch

from g2rpo.errors import UserError
from g2rpo.rewards.base import RewardConfig, choose_variant
from g2rpo.rewards.open_clip_reward import CONFIG_FILE, ClipFiles, OpenClipReward, clip_folder
from g2rpo.rewards.preprocessing import Preprocessing
from g2rpo.rewards.weights import locate

PUBLISHED = "xswu/HPSv2"
CHECKPOINTS = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}


class HPS(OpenClipReward):
    """HPS v2.1 (default) or v2.0, selected by ``variant``; about 0.2 to 0.4, higher is better.

    A ``source`` with an ``open_clip_config.json`` is loaded as described there and has no variants;
    any other source must contain the published checkpoint.
    """

    name = "hps"

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """Loads the checkpoint; see :meth:`BatchedReward.load`."""
        source = config.source or PUBLISHED
        version = choose_variant(config, tuple(CHECKPOINTS))
        if (Path(source) / CONFIG_FILE).is_file():
            if config.variant is not None:
                raise UserError(f"reward hps: {source} has no variants; remove `variant`")
            files, version = clip_folder(source), "custom"
        else:
            weights = locate(source, (CHECKPOINTS[version],), config.revision)
            model_config = open_clip.get_model_config("ViT-H-14")
            files = ClipFiles(model_config, Preprocessing(224, "longest_padded"), weights)
        return cls(files, version, device, config.batch_size)
