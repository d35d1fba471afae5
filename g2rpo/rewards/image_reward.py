"""ImageReward v1.0: BLIP towers with cross-attention and a scalar head (arXiv 2304.05977).

The towers are transformers' own BLIP classes, which compute the same function as the package's
copies; files keep the key names of the published checkpoint.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    BatchEncoding,
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerBase,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from g2rpo.files import read_json, sha256_file
from g2rpo.rewards.base import BatchedReward, RewardConfig, choose_variant
from g2rpo.rewards.preprocessing import Preprocessing
from g2rpo.rewards.weights import (
    PromptTokenizer,
    check_vocabulary,
    load_state,
    load_tokenizer,
    locate,
    read_weights,
)

PUBLISHED = "THUDM/ImageReward"
PUBLISHED_TOKENIZER = "google-bert/bert-base-uncased"
PUBLISHED_VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
}
_TEXT_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
MED_CONFIG, VISION_CONFIG = "med_config.json", "vision_config.json"
WEIGHTS_FILES = ("image_reward.safetensors", "ImageReward.pt")
# The package's constants: mean and standard deviation of the raw score on its own data, and the
# length at which prompts are truncated.
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35

# Our key -> published key, applied in order to the keys of one part.
_PUBLISHED_KEYS = {
    "vision.": (
        ("vision.", "blip.visual_encoder."),
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding.", "patch_embed.proj."),
        ("post_layernorm.", "norm."),
        ("encoder.layers.", "blocks."),
        (".self_attn.projection.", ".attn.proj."),
        (".self_attn.qkv.", ".attn.qkv."),
        (".layer_norm", ".norm"),
    ),
    "text.": (("text.", "blip.text_encoder."),),
    "head.": (("head.", "mlp.layers."),),
}
# In the published file, but not needed for the score.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def published_key(key: str) -> str:
    """The name of an :class:`ImageRewardNetwork` parameter in the published checkpoint."""
    part = key[: key.index(".") + 1]
    for ours, theirs in _PUBLISHED_KEYS[part]:
        key = key.replace(ours, theirs, 1)
    return key


def linear_head(width: int) -> nn.Sequential:
    """The head of ImageReward and of the aesthetic score: it has no activations."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


class ImageRewardNetwork(nn.Module):
    """A vision tower, a text tower with cross-attention to it, and a head on the first token."""

    def __init__(self, vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
        super().__init__()
        width = int(vision["hidden_size"])
        fixed = {"intermediate_size": 4 * width, "layer_norm_eps": 1e-6}
        self.vision = BlipVisionModel(BlipVisionConfig(**{**vision, **fixed}))
        self.text = BlipTextModel(
            BlipTextConfig(
                **{key: text[key] for key in _TEXT_SIZES},
                encoder_hidden_size=width,
                hidden_act="gelu",
                layer_norm_eps=1e-12,
                attention_probs_dropout_prob=0.0,
                bos_token_id=None,
                sep_token_id=None,
                is_decoder=True,  # adds the cross-attention
            ),
            add_pooling_layer=False,
        )
        self.head = linear_head(int(text["hidden_size"]))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Tokens ``[N, tokens, width]`` of pixels ``[N, 3, S, S]``."""
        tokens: Tensor = self.vision(pixel_values=pixels).last_hidden_state
        return tokens

    def read(self, image_tokens: Tensor, text: BatchEncoding) -> Tensor:
        """The first token's vector ``[N, width]`` of prompts that attend to encoded images."""
        seen = torch.ones(image_tokens.shape[:2], dtype=torch.long, device=image_tokens.device)
        hidden: Tensor = self.text(
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            encoder_hidden_states=image_tokens,
            encoder_attention_mask=seen,
            is_decoder=False,
        ).last_hidden_state
        return hidden[:, 0]

    def forward(self, image_tokens: Tensor, text: BatchEncoding) -> Tensor:
        """Rewards ``[N]`` of N encoded images and tokenized prompts, differentiable."""
        raw: Tensor = self.head(self.read(image_tokens, text)).squeeze(-1)
        return (raw - SCORE_MEAN) / SCORE_STD

    def published_state(self) -> dict[str, Tensor]:
        """The parameters under the names of the published checkpoint."""
        return {published_key(key): value for key, value in self.state_dict().items()}

    def load_published(self, state: Mapping[str, Tensor], path: Path) -> None:
        """Loads parameters under published names, strictly, and freezes the network."""
        ours = {published_key(key): key for key in self.state_dict()}
        renamed = {ours.get(key, key): value for key, value in state.items()}
        load_state(self, renamed, path, _UNUSED)


def add_blip_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Adds the two tokens of BLIP's text tower to a BERT tokenizer."""
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


class ImageReward(BatchedReward):
    """ImageReward v1.0: about -2.3 to 2; zero mean and unit variance on the authors' data."""

    name = "image_reward"

    def __init__(
        self, source: str, revision: str | None, device: torch.device | str, batch_size: int
    ) -> None:
        weights = locate(source, WEIGHTS_FILES, revision)
        own = Path(source) / VISION_CONFIG
        version = "custom" if own.is_file() else "v1.0"
        super().__init__(device, batch_size, version, sha256_file(weights))
        text = read_json(locate(source, (MED_CONFIG,), revision))
        vision = read_json(own) if own.is_file() else PUBLISHED_VISION
        self.network = ImageRewardNetwork(vision, text)
        self.network.load_published(read_weights(weights), weights)
        self.network.to(self.device)
        self.preprocessing = Preprocessing(int(vision["image_size"]), "shortest")
        beside = (Path(source) / "tokenizer_config.json").is_file()
        name = source if beside else PUBLISHED_TOKENIZER
        tokenizer = add_blip_tokens(load_tokenizer(name))
        check_vocabulary(name, len(tokenizer), int(text["vocab_size"]))
        self.tokenizer = PromptTokenizer(tokenizer, MAX_TOKENS)

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """Loads the model; see :meth:`BatchedReward.load`."""
        choose_variant(config, ("v1.0",))
        return cls(config.source or PUBLISHED, config.revision, device, config.batch_size)

    def prepare(
        self, images: Sequence[Tensor], prompts: Sequence[str]
    ) -> tuple[Tensor, BatchEncoding]:
        return self.preprocessing(images), self.tokenizer(prompts)

    def evaluate(self, prepared: tuple[Tensor, BatchEncoding]) -> Tensor:
        """Rewards ``[B]``."""
        pixels, tokens = (part.to(self.device) for part in prepared)
        rewards: Tensor = self.network(self.network.encode_image(pixels), tokens)
        return rewards

    def too_long(self, prompts: Sequence[str]) -> list[bool]:
        return self.tokenizer.too_long(prompts)
