"""Text conditioning of the transformer: CLIP's pooled vector and T5's sequence."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from g2rpo.errors import UserError, reason
from g2rpo.policy.folder import load_model

logger = logging.getLogger(__name__)

SMALL_ENCODERS = 10**8
"""Encoders with fewer parameters use one CPU thread: synchronising more would cost more."""


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
        """This conditioning on ``device``."""
        return Conditioning(self.prompt_embeds.to(device), self.pooled_prompt_embeds.to(device))

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Concatenates ``parts`` along the prompts."""
        return Conditioning(
            torch.cat([part.prompt_embeds for part in parts]),
            torch.cat([part.pooled_prompt_embeds for part in parts]),
        )


class ConditioningSource(Protocol):
    """Precomputed text embeddings."""

    def read(self, prompts: Sequence[str]) -> Mapping[str, Mapping[str, Tensor]]:
        """The available embeddings, by prompt.

        Each has the fields of :class:`Conditioning` without the first dimension, on the CPU.
        """
        ...


def joined(rows: Sequence[Mapping[str, Tensor]], device: torch.device) -> Conditioning:
    """Stacks ``rows`` (see :func:`row_of`) to a conditioning on ``device``."""
    return Conditioning(
        torch.stack([row["prompt_embeds"].to(device) for row in rows]),
        torch.stack([row["pooled_prompt_embeds"].to(device) for row in rows]),
    )


def row_of(conditioning: Conditioning, index: int) -> dict[str, Tensor]:
    """One prompt's embeddings, by field name."""
    return {
        "prompt_embeds": conditioning.prompt_embeds[index],
        "pooled_prompt_embeds": conditioning.pooled_prompt_embeds[index],
    }


class TextEncoders:
    """FLUX's two frozen text encoders with their tokenizers."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> None:
        """Loads both from the FluxPipeline ``folder``.

        Raises:
            UserError: a component cannot be read, or a tokenizer does not fit its encoder.
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
        self.models = (self.clip, self.t5)
        self._parameters = sum(
            parameter.numel() for model in self.models for parameter in model.parameters()
        )

    @staticmethod
    def _tokenizer(tokenizer_class: Any, folder: Path) -> Any:
        try:
            return tokenizer_class.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{folder}: cannot load the tokenizer ({reason(error)})") from None

    def check_fit(self, folder: Path, transformer: Mapping[str, Any]) -> None:
        """Checks the embeddings' widths against the configuration of a transformer.

        Raises:
            UserError: they differ; names ``folder``.
        """
        widths = (self.t5.config.d_model, self.clip.config.hidden_size)
        keys = ("joint_attention_dim", "pooled_projection_dim")
        expected = tuple(transformer.get(key, own) for key, own in zip(keys, widths, strict=True))
        if widths != expected:
            raise UserError(
                f"{folder}: text encoders of widths {widths} (T5, CLIP), but the transformer "
                f"expects {expected}; they belong to different models"
            )

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes P prompts as ``FluxPipeline.encode_prompt`` does, one by one.

        Logs a warning for truncated prompts.

        Returns:
            Conditioning on the encoders' device, in their dtype. Both sequences are padded to
            their full length and the padding is attended to, as in FLUX's training.
        """
        if not prompts:
            raise ValueError("no prompts to encode")
        encoded = Conditioning.cat([self.encode_one(prompt) for prompt in prompts])
        self.warn_of_truncated(prompts)
        return encoded

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt, [1, L, D] and [1, E].

        Always a batch of one, so that an embedding is a function of its prompt alone: in larger
        batches the last bits may depend on the batch. At FLUX's 512 tokens a single prompt fills a
        GPU.
        """
        clip_ids = self._ids(self.clip_tokenizer, prompt, self.clip_tokenizer.model_max_length)
        t5_ids = self._ids(self.t5_tokenizer, prompt, self.max_sequence_length)
        with self._threads():
            return Conditioning(
                prompt_embeds=self.t5(t5_ids).last_hidden_state,
                pooled_prompt_embeds=self.clip(clip_ids).pooler_output,
            )

    @contextmanager
    def _threads(self) -> Iterator[None]:
        if self.device.type != "cpu" or self._parameters >= SMALL_ENCODERS:
            yield
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _ids(self, tokenizer: Any, prompt: str, length: int) -> Tensor:
        encoded = tokenizer(
            [prompt],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids.to(self.device)
        return ids

    def warn_of_truncated(self, prompts: Sequence[str]) -> None:
        """Logs a warning for each encoder that truncates any of ``prompts``."""
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
                    "%d of %d prompts are truncated to the %d tokens of %s (%s); the longest has "
                    "%d; first: %.80r",
                    len(longer), len(prompts), limit, encoder, limit_name, max(longer), example,
                )  # fmt: skip
