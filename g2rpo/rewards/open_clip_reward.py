"""Rewards that are the cosine between the image and text features of an open_clip model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.files import sha256_file
from g2rpo.rewards.base import BatchedReward, once_each
from g2rpo.rewards.preprocessing import Preprocessing
from g2rpo.rewards.weights import (
    check_vocabulary,
    load_state,
    load_tokenizer,
    locate,
    read_json,
    read_weights,
)

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# As ``hf_tokenizer_name``: the tokenizer's files lie beside the weights.
TOKENIZER_BESIDE = "."

Tokenize = Callable[[Sequence[str]], Tensor]


def build_clip(model_config: Mapping[str, Any]) -> open_clip.CLIP:
    """An open_clip model with fresh weights, from the ``model_cfg`` of its configuration."""
    fields = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    unknown = sorted(model_config.keys() - set(fields))
    if unknown:
        raise UserError(f"open_clip configuration: {unknown[0]!r} is not supported")
    arguments = {key: model_config[key] for key in fields if key in model_config}
    return open_clip.CLIP(**arguments)


def build_tokenize(model_config: Mapping[str, Any], folder: Path) -> Tokenize:
    """Prompts to token ids ``[N, context_length]``, cut at the context length."""
    text = model_config["text_cfg"]
    length, vocabulary = int(text["context_length"]), int(text["vocab_size"])
    name = text.get("hf_tokenizer_name")
    if name is None:
        simple = open_clip.SimpleTokenizer(context_length=length)
        check_vocabulary(str(folder), simple.vocab_size, vocabulary)
        return lambda prompts: simple(list(prompts))
    source = folder if name == TOKENIZER_BESIDE else name
    tokenizer = load_tokenizer(source)
    check_vocabulary(str(source), len(tokenizer), vocabulary)

    def tokenize(prompts: Sequence[str]) -> Tensor:
        encoded = tokenizer(
            [" ".join(prompt.split()) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids
        return ids

    return tokenize


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


class OpenClipReward(BatchedReward):
    """Cosine of image and text features; the subclasses say which weights and preprocessing."""

    def __init__(
        self, files: ClipFiles, version: str, device: torch.device | str, batch_size: int
    ) -> None:
        super().__init__(device, batch_size, version, sha256_file(files.weights))
        self.preprocessing = files.preprocessing
        self.tokenize = build_tokenize(files.model_config, files.weights.parent)
        self.clip = build_clip(files.model_config)
        load_state(self.clip, read_weights(files.weights), files.weights)
        self.clip.to(self.device)

    def score_batch(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines ``[B]`` of checked images ``[B, H, W, 3]`` and prompts."""
        distinct, index = once_each(prompts)
        image_features = self.clip.encode_image(self.preprocessing(images, self.device), True)
        text_features = self.clip.encode_text(self.tokenize(distinct).to(self.device), True)
        cosines: Tensor = (image_features * text_features[index.to(self.device)]).sum(-1)
        return cosines
