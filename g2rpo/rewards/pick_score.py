"""PickScore: a CLIP ViT-H-14 tuned on Pick-a-Pic preferences (arXiv 2305.01569).

Several scales of this score are in use. The authors' model card gives the logit,
``exp(logit_scale) * cosine`` (about 22 for a good image); Flow-GRPO's code divides it by 26; others
use (logit - 18) / 8. The G2RPO paper's tables show about 0.226: the logit divided by its scale of
100, i.e. the cosine, which is therefore the default here.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, CLIPConfig, CLIPModel

from g2rpo.files import read_json, sha256_file
from g2rpo.rewards.base import RewardConfig, choose_variant
from g2rpo.rewards.image_tower import ImageTower
from g2rpo.rewards.preprocessing import Preprocessing
from g2rpo.rewards.weights import (
    PromptTokenizer,
    check_vocabulary,
    load_state,
    load_tokenizer,
    locate,
    read_weights,
)

PUBLISHED = "yuvalkirstain/PickScore_v1"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
SCALES = ("cosine", "logit", "logit26", "normalised")


def scale_of(name: str, logit_scale: float) -> tuple[float, float]:
    """Factor and offset from a cosine to the score on the scale ``name``.

    ``logit_scale`` is the model's own, about 100.
    """
    return {
        "cosine": (1.0, 0.0),
        "logit": (logit_scale, 0.0),
        "logit26": (logit_scale / 26, 0.0),
        "normalised": (logit_scale / 8, -18 / 8),
    }[name]


def locate_clip(source: str, revision: str | None) -> tuple[Path, Path]:
    """The weights of a CLIPModel and the folder with its two configurations."""
    weights = locate(source, ("model.safetensors", "pytorch_model.bin"), revision)
    locate(source, ("preprocessor_config.json",), revision)
    return weights, locate(source, ("config.json",), revision).parent


def read_preprocessing(path: Path) -> Preprocessing:
    """Reads the ``preprocessor_config.json`` of a CLIP processor."""
    config = read_json(path)
    size = config["crop_size"]
    pixels = size["height"] if isinstance(size, dict) else size
    return Preprocessing(
        int(pixels), "shortest", tuple(config["image_mean"]), tuple(config["image_std"])
    )


def image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Normalised features ``[N, D]`` of pixels ``[N, 3, S, S]``, differentiable."""
    features = model.get_image_features(pixel_values=pixels).pooler_output
    return nn.functional.normalize(features, dim=-1)


def text_features(model: CLIPModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Normalised features ``[N, D]`` of token ids and their mask ``[N, L]``, differentiable."""
    features = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    return nn.functional.normalize(features, dim=-1)


class PickScore(ImageTower):
    """PickScore v1; ``variant`` chooses one of :data:`SCALES`, by default the cosine."""

    name = "pick_score"

    def __init__(
        self, folder: Path, weights: Path, scale: str, device: torch.device | str, batch_size: int
    ) -> None:
        super().__init__(device, batch_size, f"v1-{scale}", sha256_file(weights))
        self.model = CLIPModel(CLIPConfig.from_dict(read_json(folder / "config.json")))
        # Older files contain the position ids, which are constants.
        constants = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
        load_state(self.model, read_weights(weights), weights, constants)
        self.model.to(self.device)
        self.preprocessing = read_preprocessing(folder / "preprocessor_config.json")
        tokenizer, text = load_tokenizer(folder), self.model.config.text_config
        check_vocabulary(str(folder), len(tokenizer), text.vocab_size)
        self.tokenizer = PromptTokenizer(tokenizer, int(text.max_position_embeddings))
        self.factor, self.offset = scale_of(scale, float(self.model.logit_scale.exp()))

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """Loads the model; see :meth:`BatchedReward.load`."""
        scale = choose_variant(config, SCALES)
        source = config.source or PUBLISHED
        weights, folder = locate_clip(source, config.revision)
        if not Path(source).is_dir():
            for file in TOKENIZER_FILES:
                locate(source, (file,), config.revision)
        return cls(folder, weights, scale, device, config.batch_size)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return image_features(self.model, pixels)

    def encode_tokens(self, tokens: BatchEncoding) -> Tensor:
        return text_features(self.model, tokens.input_ids, tokens.attention_mask)
