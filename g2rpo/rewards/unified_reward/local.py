"""Questions to a Qwen2.5-VL model in this process, through transformers."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, Qwen2_5_VLForConditionalGeneration

from g2rpo.errors import UserError
from g2rpo.files import sha256_files
from g2rpo.hub.fetch import fetch_snapshot
from g2rpo.rewards.unified_reward.answers import excerpt
from g2rpo.rewards.unified_reward.config import QuestionConfig
from g2rpo.rewards.weights import check_vocabulary, locate, read_json

MODEL_TYPE = "qwen2_5_vl"
_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` is no folder and is not written like one."""
    path_like = source.startswith((".", "/", "~")) or source.count("/") > 1
    return not path_like and not Path(source).is_dir()


def model_folder(source: str, revision: str | None = None) -> Path:
    """The folder of ``source``, fetched if it is a hub id.

    Raises:
        UserError: it is not there, or holds no config.json or safetensors file.
    """
    hub = is_hub_id(source)
    folder = fetch_snapshot(source, _FILES, revision) if hub else Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"{source}: no such folder of reward weights")
    locate(str(folder), ("config.json",))
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{source}: the folder has no *.safetensors")
    return folder


def hash_files(folder: Path, patterns: Sequence[str]) -> str:
    """One hash of the files in ``folder`` that fit, see :func:`g2rpo.files.sha256_files`."""
    return sha256_files(sorted({path for pattern in patterns for path in folder.glob(pattern)}))


class LocalModel:
    """Answers greedily, in batches padded on the left; an answer does not depend on its batch."""

    def __init__(
        self, folder: Path, name: str, config: QuestionConfig, device: torch.device
    ) -> None:
        self.model = name
        self.device = device
        self.weights_hash = hash_files(folder, ("*.safetensors",))
        default = "bfloat16" if device.type == "cuda" else "float32"
        dtype = config.dtype or default
        self.network = _load_network(folder, dtype).to(device)
        self.processor = _load_processor(folder)
        tokenizer = self.processor.tokenizer
        vocabulary = self.network.config.text_config.vocab_size
        # Published vocabularies are rounded up, so only a larger tokenizer is certainly another's.
        if len(tokenizer) > vocabulary or len(tokenizer) < vocabulary // 2:
            check_vocabulary(str(folder), len(tokenizer), vocabulary)
        tokenizer.padding_side = "left"
        # A repetition penalty also counts padding. The end of a turn is in every question, so
        # padding with it changes nothing; the usual padding token would.
        tokenizer.pad_token = tokenizer.eos_token
        added = tokenizer.added_tokens_decoder.values()
        self._control = [str(token) for token in added if token.special]
        self._generation = self._greedy(config.max_answer_tokens)
        self._lock = threading.Lock()
        self.settings: dict[str, Any] = {
            "backend": "transformers",
            "device": device.type,
            "dtype": dtype,
            "files": hash_files(folder, ("*.json", "*.jinja", "*.txt")),
            "max_answer_tokens": config.max_answer_tokens,
        }

    def _greedy(self, max_answer_tokens: int) -> Any:
        """The checkpoint's own generation settings, but greedy and of bounded length."""
        generation = self.network.generation_config
        generation.update(
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            max_length=None,
            max_new_tokens=max_answer_tokens,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        return generation

    def prepare(self, images: Sequence[Tensor], questions: Sequence[str]) -> BatchFeature:
        """See :meth:`Backend.prepare`."""
        for question in questions:
            for token in self._control:
                if token in question:
                    raise UserError(
                        f"reward unified_reward: the control token {token} stands in a question "
                        f"({excerpt(question)!r}); remove it from the prompt"
                    )
        pictures = [Image.fromarray(image.numpy()) for image in images]
        # A fast tokenizer keeps the last call's options in itself: one call at a time.
        with self._lock:
            texts = [self._chat(question) for question in questions]
            return self.processor(text=texts, images=pictures, padding=True, return_tensors="pt")

    def _chat(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return chat

    @torch.no_grad()
    def ask(self, inputs: BatchFeature) -> list[str]:
        """See :meth:`Backend.ask`."""
        try:
            tokens = self.network.generate(
                **inputs.to(self.device), generation_config=self._generation
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"reward unified_reward: {self.device} ran out of memory while it answered "
                f"{len(inputs['input_ids'])} questions; lower the reward's batch_size"
            ) from None
        answers: list[str] = self.processor.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :].cpu(),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return answers


def _load_network(folder: Path, dtype: str) -> Any:
    found = read_json(folder / "config.json").get("model_type")
    if found != MODEL_TYPE:
        raise UserError(
            f"{folder}: its model_type is {found!r}, but only {MODEL_TYPE!r} runs in this "
            "process; serve it with vLLM and set question.server"
        )
    try:
        network, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named below
        )
    except Exception as error:  # damaged files raise many kinds
        line = " ".join(str(error).split())
        raise UserError(f"{folder}: cannot be loaded ({line[:300]}); fetch it again") from None
    # transformers would go on with random weights in place of the missing ones.
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    missing = sorted([*report["missing_keys"], *mismatched])
    if missing:
        raise UserError(
            f"{folder}: not the weights of its configuration: {missing[0]!r} is missing or has "
            f"another shape ({len(missing)} in all)"
        )
    return network.eval().requires_grad_(False)


def _load_processor(folder: Path) -> Any:
    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: cannot load its processor ({line})") from None
