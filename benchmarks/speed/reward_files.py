"""Reward models with random weights in the files of the published ones, at full or toy size.

Default initialisations give constant scores, with which every comparison agrees: all matrices are
drawn anew. Full size is the published architecture: ViT-H-14, or BLIP-large for ImageReward.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import open_clip
import torch
from transformers import BertTokenizer, CLIPConfig, CLIPModel

from benchmarks.mini_world.small_rewards import (
    PAD,
    UNKNOWN,
    liven,
    save_open_clip,
    save_transformers_clip,
    word_tokenizer,
)
from benchmarks.mini_world.tokenizers import words
from g2rpo.files import write_json
from g2rpo.rewards.hps import CHECKPOINTS
from g2rpo.rewards.image_reward import (
    MED_CONFIG,
    PUBLISHED_VISION,
    VISION_CONFIG,
    ImageRewardNetwork,
    add_blip_tokens,
)
from g2rpo.rewards.open_clip_reward import build_clip

Size = Literal["full", "small"]
HPS_NAME, CLIP_NAME = "ViT-H-14", "ViT-H-14-quickgelu"
"""open_clip's names of the architectures of HPS and of the CLIP score."""
CLIP_RESIZE = "squash"
"""How DFN5B's images are resized."""
_CONTEXT = 77

_SMALL_OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 224,
        "patch_size": 56,
        "width": 32,
        "layers": 2,
        "head_width": 8,
    },
    "text_cfg": {
        "context_length": _CONTEXT,
        "vocab_size": 49408,
        "width": 32,
        "heads": 4,
        "layers": 2,
    },
}
# PickScore's own configuration, then the toy's: width, layers and heads of each tower, patch.
_PICK_SCORE: dict[Size, tuple[tuple[int, int, int], tuple[int, int, int], int, int]] = {
    "full": ((1024, 24, 16), (1280, 32, 16), 14, 49408),
    "small": ((32, 2, 4), (32, 2, 4), 56, 1000),
}
_BERT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "vocab_size": 30524,
    # What the package's own text tower asks for beside its sizes.
    "add_cross_attention": True,
    "hidden_act": "gelu",
    "fusion": "",
}
# The package's head takes 768 numbers whatever the tower's configuration.
_SMALL_BERT = {**_BERT, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 1000}
_SMALL_VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 224,
    "patch_size": 56,
}


def small_architecture(size: Size) -> Mapping[str, Any] | None:
    """The open_clip configuration in place of ViT-H-14's; None at full size."""
    return _SMALL_OPEN_CLIP if size == "small" else None


@contextmanager
def open_clip_architectures(size: Size) -> Iterator[None]:
    """open_clip with its two ViT-H-14 replaced by the toy at small size."""
    small = small_architecture(size)
    replaced = {} if small is None else {HPS_NAME: small, CLIP_NAME: small}
    with patch.dict("open_clip.factory._MODEL_CONFIGS", replaced):
        yield


def write_hps(folder: Path) -> None:
    """The checkpoint as it is published: a ``state_dict`` in float16."""
    clip = build_clip(open_clip.get_model_config(HPS_NAME))
    liven(clip)
    torch.save({"state_dict": clip.half().state_dict()}, folder / CHECKPOINTS["v2.1"])


def write_clip(folder: Path) -> None:
    """An open_clip folder."""
    config = open_clip.get_model_config(CLIP_NAME)
    clip = build_clip(config)
    liven(clip)
    save_open_clip(clip, config, CLIP_RESIZE, folder)


def write_pick_score(folder: Path, size: Size) -> None:
    """A transformers CLIPModel folder with a word tokenizer of the vocabulary's size."""
    text, vision, patch_size, vocabulary = _PICK_SCORE[size]
    fillers = [f"filler{number}" for number in range(vocabulary)]
    known = [*words(), *fillers]
    rest = len(word_tokenizer([]))
    tokenizer = word_tokenizer(known[: vocabulary - rest])
    tokenizer.model_max_length = _CONTEXT
    config = CLIPConfig(
        text_config={
            **_tower(*text),
            "vocab_size": vocabulary,
            "max_position_embeddings": _CONTEXT,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**_tower(*vision), "image_size": 224, "patch_size": patch_size},
        projection_dim=text[0],
    )
    clip = CLIPModel(config)
    liven(clip)
    save_transformers_clip(clip, tokenizer, folder)


def _tower(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "gelu",
    }


def image_reward_vision(size: Size) -> dict[str, Any]:
    """The sizes of ImageReward's vision tower."""
    return PUBLISHED_VISION if size == "full" else _SMALL_VISION


def write_image_reward(folder: Path, size: Size) -> None:
    """``ImageReward.pt`` with its configuration, and a BERT tokenizer of made-up words."""
    text = _BERT if size == "full" else _SMALL_BERT
    vision = image_reward_vision(size)
    network = ImageRewardNetwork(vision, text)
    liven(network)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(network.published_state(), folder / "ImageReward.pt")
    write_json(folder / MED_CONFIG, text)
    write_json(folder / VISION_CONFIG, vision)
    blip_tokens, vocabulary = 2, int(str(text["vocab_size"]))
    tokens = [PAD, UNKNOWN, "[CLS]", "[SEP]", "[MASK]", ",", *words()]
    tokens += [f"filler{number}" for number in range(vocabulary)]
    chosen = tokens[: vocabulary - blip_tokens]
    bert = BertTokenizer(vocab={token: number for number, token in enumerate(chosen)})
    add_blip_tokens(bert).save_pretrained(folder)
