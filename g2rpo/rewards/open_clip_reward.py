"""Rewards from the cosine of an open_clip model's image and text features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.files import read_json, sha256_file
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

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZER_BESIDE = "."
"""As ``hf_tokenizer_name``: the tokenizer's files are next to the weights."""


def build_clip(model_config: Mapping[str, Any]) -> open_clip.CLIP:
    """An open_clip model with fresh weights, from the ``model_cfg`` of its configuration."""
    fields = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    unknown = sorted(model_config.keys() - set(fields))
    if unknown:
        raise UserError(f"open_clip configuration: {unknown[0]!r} is not supported")
    arguments = {key: model_config[key] for key in fields if key in model_config}
    return open_clip.CLIP(**arguments)


class ClipTokenizer(PromptTokenizer):
    """Prompts to the token ids of an open_clip text tower, cut off at its context length."""

    def __init__(self, model_config: Mapping[str, Any], folder: Path) -> None:
        text = model_config["text_cfg"]
        length, vocabulary = int(text["context_length"]), int(text["vocab_size"])
        name = text.get("hf_tokenizer_name")
        if name is None:
            self._simple = open_clip.SimpleTokenizer(context_length=length)
            check_vocabulary(str(folder), self._simple.vocab_size, vocabulary)
            self.limit = length
            return
        self._simple = None
        source = folder if name == TOKENIZER_BESIDE else name
        tokenizer = load_tokenizer(source)
        check_vocabulary(str(source), len(tokenizer), vocabulary)
        super().__init__(tokenizer, length, "max_length")

    def __call__(self, prompts: Sequence[str]) -> Any:
        """Token ids ``[N, context_length]``."""
        if self._simple is not None:
            return self._simple(list(prompts))
        return super().__call__([" ".join(prompt.split()) for prompt in prompts]).input_ids

    def too_long(self, prompts: Sequence[str]) -> list[bool]:
        if self._simple is not None:
            return [len(self._simple.encode(prompt)) + 2 > self.limit for prompt in prompts]
        return super().too_long([" ".join(prompt.split()) for prompt in prompts])


@dataclass(frozen=True)
class ClipFiles:
    """What an open_clip model is loaded from."""

    model_config: Mapping[str, Any]
    preprocessing: Preprocessing
    weights: Path


def clip_folder(source: str, revision: str | None = None) -> ClipFiles:
    """The files of an open_clip folder or hub repository (``open_clip_config.json`` + weights)."""
    path = locate(source, (CONFIG_FILE,), revision)
    config = read_json(path)
    for key in ("model_cfg", "preprocess_cfg"):
        if key not in config:
            raise UserError(f"{path}: missing key {key!r}")
    size = int(config["model_cfg"]["vision_cfg"]["image_size"])
    preprocessing = Preprocessing.from_open_clip(config["preprocess_cfg"], size, str(path))
    return ClipFiles(config["model_cfg"], preprocessing, locate(source, WEIGHTS_FILES, revision))


class OpenClipReward(ImageTower):
    """Cosine of image and text features; subclasses choose the weights and preprocessing."""

    def __init__(
        self, files: ClipFiles, version: str, device: torch.device | str, batch_size: int
    ) -> None:
        super().__init__(device, batch_size, version, sha256_file(files.weights))
        self.preprocessing = files.preprocessing
        self.tokenizer = ClipTokenizer(files.model_config, files.weights.parent)
        self.clip = build_clip(files.model_config)
        load_state(self.clip, read_weights(files.weights), files.weights)
        self.clip.to(self.device)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.clip.encode_image(pixels, True)
        return features

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.clip.encode_text(tokens, True)
        return features
