"""What the transformer is told about the prompts: CLIP's pooled vector and T5's sequence."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from g2rpo.errors import UserError
from g2rpo.policy.folder import load_model

logger = logging.getLogger(__name__)

ENCODE_BATCH = 32
"""Prompts that go through the text encoders at once."""


@dataclass(frozen=True)
class Conditioning:
    """The text embeddings of P prompts.

    Attributes:
        prompt_embeds: [P, L, D], T5's last hidden states, padded to L = max_sequence_length.
        pooled_prompt_embeds: [P, E], CLIP's pooled output.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor

    def __post_init__(self) -> None:
        if self.prompt_embeds.ndim != 3 or self.pooled_prompt_embeds.ndim != 2:
            raise ValueError("prompt_embeds must be [P, L, D] and pooled_prompt_embeds [P, E]")
        if len(self.prompt_embeds) != len(self.pooled_prompt_embeds):
            raise ValueError("prompt_embeds and pooled_prompt_embeds differ in length")

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def select(self, index: Tensor | Sequence[int]) -> "Conditioning":
        """The conditioning of the prompts at ``index`` ([B] integers, repeats allowed)."""
        chosen = torch.as_tensor(index, dtype=torch.long, device=self.prompt_embeds.device)
        return Conditioning(self.prompt_embeds[chosen], self.pooled_prompt_embeds[chosen])

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same conditioning on ``device``."""
        return Conditioning(self.prompt_embeds.to(device), self.pooled_prompt_embeds.to(device))

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """The conditionings of ``parts`` one after the other."""
        return Conditioning(
            torch.cat([part.prompt_embeds for part in parts]),
            torch.cat([part.pooled_prompt_embeds for part in parts]),
        )


class TextEncoders:
    """FLUX's two frozen text encoders with their tokenizers."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> None:
        """Loads both from the FluxPipeline ``folder``.

        Raises:
            UserError: a component cannot be read, or a tokenizer has more tokens than its encoder.
        """
        self.device = device
        self.max_sequence_length = max_sequence_length
        self.clip_tokenizer = self._tokenizer(CLIPTokenizer, folder / "tokenizer")
        self.t5_tokenizer = self._tokenizer(T5TokenizerFast, folder / "tokenizer_2")
        self.clip = load_model(CLIPTextModel, folder / "text_encoder", dtype=dtype)
        self.t5 = load_model(T5EncoderModel, folder / "text_encoder_2", dtype=dtype)
        for name, tokenizer, encoder in (
            ("tokenizer", self.clip_tokenizer, self.clip),
            ("tokenizer_2", self.t5_tokenizer, self.t5),
        ):
            if len(tokenizer) > encoder.config.vocab_size:
                raise UserError(
                    f"{folder}: {name} has {len(tokenizer)} tokens but its encoder embeds only "
                    f"{encoder.config.vocab_size}; they belong to different models"
                )
            encoder.requires_grad_(False).to(device)

    @staticmethod
    def _tokenizer(tokenizer_class: Any, folder: Path) -> Any:
        try:
            return tokenizer_class.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{folder}: tokenizer cannot be loaded ({reason})") from None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes P prompts as ``FluxPipeline.encode_prompt`` does, in slices.

        Returns:
            Conditioning on the encoders' device, in their dtype. Both sequences are padded to
            their full length and the padding is attended to, as FLUX was trained.
        """
        if not prompts:
            raise ValueError("no prompts to encode")
        parts = []
        for start in range(0, len(prompts), ENCODE_BATCH):
            batch = list(prompts[start : start + ENCODE_BATCH])
            clip_ids = self._ids(self.clip_tokenizer, batch, self.clip_tokenizer.model_max_length)
            t5_ids = self._ids(self.t5_tokenizer, batch, self.max_sequence_length)
            parts.append(
                Conditioning(
                    prompt_embeds=self.t5(t5_ids).last_hidden_state,
                    pooled_prompt_embeds=self.clip(clip_ids).pooler_output,
                )
            )
        self._tell_truncated(prompts)
        return Conditioning.cat(parts)

    def _ids(self, tokenizer: Any, prompts: list[str], length: int) -> Tensor:
        encoded = tokenizer(
            prompts,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids.to(self.device)
        return ids

    def _tell_truncated(self, prompts: Sequence[str]) -> None:
        limits = (
            ("T5", "max_sequence_length", self.t5_tokenizer, self.max_sequence_length),
            ("CLIP", "its limit", self.clip_tokenizer, self.clip_tokenizer.model_max_length),
        )
        for encoder, limit_name, tokenizer, limit in limits:
            lengths = [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]
            longer = [length for length in lengths if length > limit]
            if longer:
                example = prompts[lengths.index(longer[0])]
                logger.warning(
                    "%d of %d prompts are longer than the %d tokens of %s (%s), the longest has "
                    "%d: %s does not see their ends; first: %.80r",
                    len(longer), len(prompts), limit, encoder, limit_name,
                    max(longer), encoder, example,
                )  # fmt: skip
