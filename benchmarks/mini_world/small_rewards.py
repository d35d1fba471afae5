"""Small counterparts of the published reward models, in the same file formats.

The mini world trains them; the smoke profile uses them with random weights. Each gives
differentiable features for training and is saved as a folder that the class in ``g2rpo.rewards``
loads just as it loads the published weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BatchEncoding,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks.mini_world.tokenizers import token_ids
from g2rpo.files import write_json
from g2rpo.rewards.image_reward import (
    MAX_TOKENS,
    MED_CONFIG,
    VISION_CONFIG,
    ImageRewardNetwork,
    add_blip_tokens,
)
from g2rpo.rewards.open_clip_reward import (
    CONFIG_FILE,
    TOKENIZER_BESIDE,
    WEIGHTS_FILES,
    build_clip,
)
from g2rpo.rewards.pick_score import image_features, text_features

CONTEXT_LENGTH = 24
"""Context length of the small text towers, with the start and end tokens."""
IMAGE_SIZE = 32
PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[START]", "[END]"
PAD_ID = 0
_MEAN, _STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def normalise(pixels: Tensor) -> Tensor:
    """Pixels ``[N, 3, 32, 32]`` in 0..1, normalised for the small vision towers."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return (pixels - mean) / std


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A token for each of ``words``; ``[END]`` has the highest id, which CLIP towers look for."""
    tokens = [PAD, UNKNOWN, START, ",", *words, END]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, tokens.index(START)), (END, tokens.index(END))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        model_max_length=CONTEXT_LENGTH,
    )


@torch.no_grad()
def liven(module: nn.Module) -> None:
    """Redraws every matrix of ``module`` at a scale that preserves the size of activations.

    Biases and normalisation layers are kept. Initialisations for wide models (standard deviation
    0.02) are far too small for narrow ones.
    """
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            looked_up = isinstance(owner, nn.Embedding) or "embedding" in name
            inputs = 1 if looked_up else parameter[0].numel()
            if name in ("proj", "text_projection"):  # open_clip keeps these transposed
                inputs = parameter.shape[0]
            parameter.normal_(0.0, inputs**-0.5)


def save_open_clip(
    clip: nn.Module, model_config: Mapping[str, Any], resize_mode: str, folder: Path
) -> None:
    """Writes ``open_clip_config.json`` and the weights of an open_clip model."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": list(_MEAN), "std": list(_STD), "resize_mode": resize_mode}
    write_json(folder / CONFIG_FILE, {"model_cfg": model_config, "preprocess_cfg": preprocess})
    safetensors.torch.save_file(clip.state_dict(), folder / WEIGHTS_FILES[0])


def save_transformers_clip(
    clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Saves a standard CLIPModel folder with its processor's files."""
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = int(clip.config.vision_config.image_size)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": list(_MEAN),
        "image_std": list(_STD),
        "resample": 3,
    }
    write_json(folder / "preprocessor_config.json", preprocessor)


class SmallReward(ABC, nn.Module):
    """A trainable reward model of images and token ids."""

    name: ClassVar[str]
    """The reward's name in the registry, and its folder's."""
    tokenizer: PreTrainedTokenizerBase
    width: int
    """Length of :meth:`summary`'s vectors."""
    caption_width: int
    """Length of :meth:`encode_caption`'s vectors."""

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids ``[N, CONTEXT_LENGTH]``, padded with ``PAD_ID``."""
        return token_ids(self.tokenizer, captions, CONTEXT_LENGTH)

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Whatever :meth:`pair_scores` needs of pixels ``[N, 3, 32, 32]``, N first."""

    def summary(self, encoded: Tensor) -> Tensor:
        """One vector ``[N, width]`` for each encoded image."""
        return encoded

    @abstractmethod
    def encode_caption(self, ids: Tensor) -> Tensor:
        """Features ``[N, caption_width]`` of token ids ``[N, L]``, L at most the context length."""

    @abstractmethod
    def pair_scores(self, encoded: Tensor, ids: Tensor) -> Tensor:
        """Scores ``[N]`` of encoded images and token ids, pair by pair."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Saves a folder that the reward's class loads."""


class SmallDualEncoder(SmallReward):
    """Two towers; the score is the cosine of their features.

    Training features have the length ``sqrt(width)``, so that linear heads learn as fast as the
    towers.
    """

    logit_scale: nn.Parameter

    def scaled(self, features: Tensor) -> Tensor:
        """``features`` ``[N, width]`` scaled to the length ``sqrt(width)``."""
        scale: float = self.width**0.5
        return scale * nn.functional.normalize(features, dim=-1)

    def pair_scores(self, encoded: Tensor, ids: Tensor) -> Tensor:
        """Cosines ``[N]``."""
        return nn.functional.cosine_similarity(encoded, self.encode_caption(ids))


class SmallOpenClip(SmallDualEncoder):
    """An open_clip model, for HPS and the CLIP score."""

    def __init__(
        self, words: Sequence[str], embed: int, vision: dict[str, Any], text: dict[str, Any]
    ) -> None:
        super().__init__()
        self.tokenizer = word_tokenizer(words)
        self.width = self.caption_width = embed
        self.model_config: dict[str, Any] = {
            "embed_dim": embed,
            "vision_cfg": {"image_size": IMAGE_SIZE, **vision},
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": len(self.tokenizer),
                "hf_tokenizer_name": TOKENIZER_BESIDE,
                **text,
            },
        }
        self.clip = build_clip(self.model_config)
        self.logit_scale = self.clip.logit_scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Features ``[N, width]``, all of length ``sqrt(width)``."""
        return self.scaled(self.clip.encode_image(pixels))

    def encode_caption(self, ids: Tensor) -> Tensor:
        """Features ``[N, width]``, all of length ``sqrt(width)``.

        Equal in direction to open_clip's ``encode_text``, which only takes the full context
        length; most of that would be padding.
        """
        clip, length = self.clip, ids.shape[1]
        hidden = clip.token_embedding(ids) + clip.positional_embedding[:length]
        hidden = clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length])
        last = clip.ln_final(hidden[torch.arange(len(ids)), ids.argmax(-1)])
        return self.scaled(last @ clip.text_projection)

    def save(self, folder: Path) -> None:
        """Writes ``open_clip_config.json``, the weights and the tokenizer."""
        save_open_clip(self.clip, self.model_config, "shortest", folder)
        self.tokenizer.save_pretrained(folder)


class SmallHPS(SmallOpenClip):
    """HPS: a vision transformer with patches of 8 pixels."""

    name = "hps"

    def __init__(self, words: Sequence[str]) -> None:
        vision = {"patch_size": 8, "width": 96, "layers": 3, "head_width": 24}
        super().__init__(words, 128, vision, {"width": 80, "heads": 4, "layers": 2})


class SmallCLIPScore(SmallOpenClip):
    """CLIP score: large patches, one for each quarter of the picture."""

    name = "clip"

    def __init__(self, words: Sequence[str]) -> None:
        vision = {"patch_size": 16, "width": 128, "layers": 3, "head_width": 32}
        super().__init__(words, 160, vision, {"width": 64, "heads": 2, "layers": 2})


class SmallPickScore(SmallDualEncoder):
    """PickScore: transformers' CLIPModel with small patches and a thin, deep tower."""

    name = "pick_score"

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__()
        self.tokenizer = word_tokenizer(words)
        self.width = self.caption_width = 128
        text = {
            "vocab_size": len(self.tokenizer),
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT_LENGTH,
            "pad_token_id": PAD_ID,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "hidden_act": "gelu",
        }
        vision = {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "hidden_act": "gelu",
        }
        self.clip = CLIPModel(
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=self.width)
        )
        self.logit_scale = self.clip.logit_scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Features ``[N, width]``, all of length ``sqrt(width)``."""
        return self.scaled(image_features(self.clip, pixels))

    def encode_caption(self, ids: Tensor) -> Tensor:
        """Features ``[N, width]``, all of length ``sqrt(width)``."""
        return self.scaled(text_features(self.clip, ids, (ids != PAD_ID).long()))

    def save(self, folder: Path) -> None:
        """Saves a standard CLIPModel folder with its processor's files."""
        save_transformers_clip(self.clip, self.tokenizer, folder)


class SmallImageReward(SmallReward):
    """ImageReward: a text tower that attends to the picture, with a scalar head."""

    name = "image_reward"

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__()
        self.words = list(words)
        tokens = [PAD, UNKNOWN, "[CLS]", "[SEP]", "[MASK]", ",", *words]
        bert = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})
        self.tokenizer = add_blip_tokens(bert)
        self.width = 4 * 64
        self.vision_config = {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
        }
        self.text_config = {
            "vocab_size": len(self.tokenizer),
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_TOKENS,
        }
        self.network = ImageRewardNetwork(self.vision_config, self.text_config)
        liven(self.network)
        self._prepare_for_training()
        self.caption_width = self.text_config["hidden_size"]

    @torch.no_grad()
    def _prepare_for_training(self) -> None:
        """Scales down the residual branches and disables dropout in the wide head."""
        adding = ("self_attn.projection.weight", "mlp.fc2.weight")
        for name, parameter in self.network.vision.named_parameters():
            if name.endswith(adding):
                parameter.mul_((2 * self.vision_config["num_hidden_layers"]) ** -0.5)
        for module in self.network.head.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Tokens ``[N, tokens, width]``."""
        return self.network.encode_image(pixels)

    def summary(self, encoded: Tensor) -> Tensor:
        """The mean token of each quarter of the picture, side by side."""
        side = self.vision_config["image_size"] // self.vision_config["patch_size"] // 2
        grid = encoded[:, 1:].unflatten(1, (2, side, 2, side))
        quarters: Tensor = grid.mean((2, 4)).flatten(1)
        return quarters

    def encode_caption(self, ids: Tensor) -> Tensor:
        """The first token's vector, from the text tower with an empty picture."""
        nothing = torch.zeros(len(ids), 1, self.vision_config["hidden_size"])
        features: Tensor = self.network.read(nothing, _masked(ids))
        return features

    def pair_scores(self, encoded: Tensor, ids: Tensor) -> Tensor:
        """Rewards ``[N]``."""
        rewards: Tensor = self.network(encoded, _masked(ids))
        return rewards

    def save(self, folder: Path) -> None:
        """Writes the weights under published names, both configurations and the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.contiguous() for key, value in self.network.published_state().items()}
        safetensors.torch.save_file(state, folder / "image_reward.safetensors")
        write_json(folder / MED_CONFIG, self.text_config)
        write_json(folder / VISION_CONFIG, self.vision_config)
        self.tokenizer.save_pretrained(folder)


def _masked(ids: Tensor) -> BatchEncoding:
    return BatchEncoding({"input_ids": ids, "attention_mask": (ids != PAD_ID).long()})
