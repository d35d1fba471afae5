"""A vision-language model in this process, through transformers."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from g2rpo.errors import UserError, reason
from g2rpo.files import read_json, sha256_files
from g2rpo.hub.fetch import fetch_snapshot
from g2rpo.rewards.question import QuestionConfig
from g2rpo.rewards.weights import check_vocabulary, is_hub_id, locate
from g2rpo.text import excerpt

_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")


def model_folder(source: str, revision: str | None = None) -> Path:
    """The folder of ``source``, fetched if it is a hub id.

    Raises:
        UserError: there is no such folder, or it has no config.json or safetensors file.
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
    """One hash of the matching files in ``folder``, see :func:`g2rpo.files.sha256_files`."""
    return sha256_files(sorted({path for pattern in patterns for path in folder.glob(pattern)}))


class ChatInputs:
    """Turns pictures and questions into a model's padded inputs; thread-safe."""

    def __init__(self, folder: Path, **options: Any) -> None:
        """``options``: arguments of the processor in ``folder``, for every call.

        Raises:
            UserError: the processor cannot be loaded.
        """
        try:
            self.processor = AutoProcessor.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder}: cannot load the processor ({reason(error)})") from None
        self.tokenizer = self.processor.tokenizer
        self._options = options
        self._lock = threading.Lock()

    def __call__(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> BatchFeature:
        """One turn of a user for each of N pictures and questions, none of them truncated.

        Raises:
            UserError: the model cannot process a picture, such as one of 1 x 300 pixels; names it.
        """
        try:
            return self._batch(pictures, questions)
        except ValueError as error:
            if len(pictures) == 1:
                raise cannot_score(pictures[0].size, excerpt(questions[0]), error) from None
            for picture, question in zip(pictures, questions, strict=True):
                self([picture], [question])  # finds the picture
            raise

    def _batch(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> BatchFeature:
        chats = []
        for picture, question in zip(pictures, questions, strict=True):
            content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
            chats.append([{"role": "user", "content": content}])
        # Fast tokenizers are not thread-safe: they store the options of the last call.
        with self._lock:
            return self.processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                sanitize_control_tokens=True,  # prompts may contain text such as <|image_pad|>
                processor_kwargs={"padding": True, **self._options},
            )


def cannot_score(size: tuple[int, int], asked: str, error: ValueError) -> UserError:
    """The error for an image of ``size`` (width, height) that a processor has refused."""
    width, height = size
    return UserError(
        f"image of {width} x {height} pixels for {asked!r}: {reason(error)}; crop it or leave it "
        "out"
    )


class LocalModel:
    """Answers greedily, in left-padded batches; an answer does not depend on its batch.

    Attributes:
        model: its name, with its dtype unless that is float32, for a reward's version.
        settings: everything but the weights that affects answers, as JSON values.
    """

    def __init__(
        self, folder: Path, source: str, config: QuestionConfig, device: torch.device
    ) -> None:
        dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        name = source if is_hub_id(source) else folder.resolve().name
        self.model = name if dtype == "float32" else f"{name}-{dtype}"
        self.device = device
        self.weights_hash = hash_files(folder, ("*.safetensors",))
        self.settings: dict[str, Any] = {
            "backend": "transformers",
            "device": device.type,
            "dtype": dtype,
            "files": hash_files(folder, ("*.json", "*.jinja", "*.txt")),
            "max_answer_tokens": config.max_answer_tokens,
        }
        self.network = _load_network(folder, dtype).to(device)
        self._inputs = ChatInputs(folder)
        self.processor, tokenizer = self._inputs.processor, self._inputs.tokenizer
        vocabulary = self.network.config.get_text_config().vocab_size
        # Published vocabularies are rounded up, so the sizes may differ a little.
        if not vocabulary // 2 <= len(tokenizer) <= vocabulary:
            check_vocabulary(str(folder), len(tokenizer), vocabulary)
        tokenizer.padding_side = "left"
        # A repetition penalty also counts padding. Every question contains the end-of-turn token,
        # so padding with it changes nothing.
        tokenizer.pad_token = tokenizer.eos_token
        # The checkpoint's own generation settings, but greedy and of bounded length.
        self.network.generation_config.update(
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            max_length=None,
            max_new_tokens=config.max_answer_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )

    def prepare(self, images: Sequence[Tensor], questions: Sequence[str]) -> BatchFeature:
        """Preprocesses N uint8 images ``[H, W, 3]`` for :meth:`ask`; thread-safe, on the CPU."""
        return self._inputs([Image.fromarray(image.numpy()) for image in images], questions)

    @torch.no_grad()
    def ask(self, inputs: BatchFeature) -> list[str]:
        """The N answers.

        Raises:
            UserError: memory ran out.
        """
        try:
            tokens = self.network.generate(**inputs.to(self.device))
        except torch.OutOfMemoryError:
            raise UserError(
                f"reward unified_reward: {self.device} ran out of memory with "
                f"{len(inputs['input_ids'])} questions in a batch; lower the reward's batch_size"
            ) from None
        answers: list[str] = self.processor.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return answers

    @torch.no_grad()
    def first_token(self, inputs: BatchFeature, answers: Sequence[Sequence[str]]) -> Tensor:
        """The probability ``[N]`` that the model's answer starts as one of its ``answers`` does.

        Only their first tokens count, each once. The model's own distribution: the softmax in
        float32 of its logits, without the penalties of its generation settings.
        """
        output = self.network.generate(
            **inputs.to(self.device),
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        encode = self.processor.tokenizer.encode
        tokens = [{encode(text, add_special_tokens=False)[0] for text in each} for each in answers]
        probabilities: Tensor = output.logits[0].float().softmax(-1)
        pairs = zip(probabilities, tokens, strict=True)
        return torch.stack([row[sorted(chosen)].sum() for row, chosen in pairs])


def _load_network(folder: Path, dtype: str) -> Any:
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise UserError(
            f"{folder}: transformers has no vision-language model of model_type {model_type!r}; "
            "serve it with vLLM and set question.server"
        )
    try:
        network, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below
        )
    except Exception as error:  # damaged files raise many kinds
        raise UserError(f"{folder}: cannot be loaded ({reason(error)}); fetch it again") from None
    # transformers would initialise missing weights at random.
    missing = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if missing:
        raise UserError(
            f"{folder}: the weights do not fit config.json: {missing[0]!r} is missing or has "
            f"another shape ({len(missing)} in all)"
        )
    return network.eval().requires_grad_(False)
