"""Text conditioning of the transformer: a pooled vector and a sequence."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from g2rpo.errors import UserError, reason
from g2rpo.policy.folder import load_model

logger = logging.getLogger(__name__)

SMALL_ENCODERS = 10**8
"""Encoders with fewer parameters use one CPU thread: synchronising more would cost more."""


@dataclass(frozen=True)
class Conditioning:
    """The text embeddings of P prompts.

    Attributes:
        prompt_embeds: [P, L, D], a sequence for each prompt, padded to L. FLUX: T5's last hidden
            states, L = max_sequence_length.
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

    def expand(self, size: int) -> "Conditioning":
        """The conditioning of one prompt, ``size`` times; a view."""
        sequence, pooled = self.prompt_embeds, self.pooled_prompt_embeds
        return Conditioning(sequence.expand(size, -1, -1), pooled.expand(size, -1))

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


class TextEncoders(ABC):
    """The frozen text encoders of a pipeline with their tokenizers.

    Attributes:
        max_sequence_length: T5 tokens to which prompts are padded or truncated.
        limits: for each tokenizer that truncates: its encoder's name, the setting that limits it,
            the tokenizer, and its longest sequence in tokens.
    """

    models: tuple[Any, ...]
    limits: tuple[tuple[str, str, Any, int], ...]

    @abstractmethod
    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, max_sequence_length: int
    ) -> None:
        """Loads them from the pipeline ``folder``.

        Raises:
            UserError: a component cannot be read, or a tokenizer does not fit its encoder.
        """
        self.folder, self.dtype, self.device = folder, dtype, device
        self.max_sequence_length = max_sequence_length

    def _load(self, ending: str, tokenizer_class: Any, model_class: Any) -> tuple[Any, Any]:
        """The tokenizer and the encoder in the folders of this ``ending``."""
        name = f"tokenizer{ending}"
        path = self.folder / name
        try:
            tokenizer = tokenizer_class.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{path}: cannot load the tokenizer ({reason(error)})") from None
        encoder = load_model(model_class, self.folder / f"text_encoder{ending}", dtype=self.dtype)
        if len(tokenizer) > encoder.config.vocab_size:
            raise UserError(
                f"{self.folder}: {name} has {len(tokenizer)} tokens but its encoder embeds only "
                f"{encoder.config.vocab_size}; they belong to different models"
            )
        encoder.requires_grad_(False).to(self.device)
        return tokenizer, encoder

    @abstractmethod
    def check_fit(self, folder: Path, transformer: Mapping[str, Any]) -> None:
        """Checks the embeddings' widths against the configuration of a transformer.

        Raises:
            UserError: they differ; names ``folder``.
        """

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes P prompts as the pipeline's ``encode_prompt`` does, one by one.

        Logs a warning for truncated prompts.

        Returns:
            Conditioning on the encoders' device, in their dtype. All sequences are padded to their
            full length and the padding is attended to, as in the models' training.
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
        with self._threads():
            return self._embedded(prompt)

    @abstractmethod
    def _embedded(self, prompt: str) -> Conditioning:
        """See :meth:`encode_one`."""

    @contextmanager
    def _threads(self) -> Iterator[None]:
        parameters = sum(p.numel() for model in self.models for p in model.parameters())
        if self.device.type != "cpu" or parameters >= SMALL_ENCODERS:
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
        for encoder, limit_name, tokenizer, limit in self.limits:
            lengths = [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]
            longer = [length for length in lengths if length > limit]
            if longer:
                example = prompts[lengths.index(longer[0])]
                logger.warning(
                    "%d of %d prompts are truncated to the %d tokens of %s (%s); the longest has "
                    "%d; first: %.80r",
                    len(longer), len(prompts), limit, encoder, limit_name, max(longer), example,
                )  # fmt: skip
