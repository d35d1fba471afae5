"""A tokenizer, a processor and a chat template like those of Qwen2.5-VL, made offline."""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
CONTROL = [END_OF_TEXT, TURN, END_OF_TURN, VISION_START, VISION_END, IMAGE, VIDEO]
CHAT = (
    "{% for turn in messages %}"
    f"{TURN}"
    "{{ turn.role }}\n"
    "{% for part in turn.content %}"
    "{% if part.type == 'image' %}"
    f"{VISION_START}{IMAGE}{VISION_END}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    f"{END_OF_TURN}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    f"{TURN}assistant\n"
    "{% endif %}"
)
PATCH, MERGE = 14, 2
_LETTERS = str.maketrans(" \n", "ĠĊ")
"""How a byte-level vocabulary writes a space and a line break."""


def token(text: str) -> str:
    """``text`` as an entry of a tokenizer's vocabulary."""
    return text.translate(_LETTERS)


def qwen_tokenizer(
    corpus: Sequence[str], learned: int = 400, more: Sequence[str] = ()
) -> Qwen2TokenizerFast:
    """Byte-level BPE of ``learned`` tokens, with the control tokens.

    Args:
        corpus: the texts whose words become tokens.
        learned: number of tokens that are learned.
        more: texts that are a token each in an answer, but are never found in a question.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All bytes, so that any text can be written, and the words of the corpus as one token each.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=learned, initial_alphabet=alphabet, special_tokens=CONTROL, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    written = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in written["merges"]]
    vocabulary = written["vocab"]
    vocabulary |= {token(text): len(vocabulary) + i for i, text in enumerate(more)}
    return Qwen2TokenizerFast(
        vocab=vocabulary,
        merges=merges,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        additional_special_tokens=CONTROL[1:],
    )


def qwen_processor(
    tokenizer: Qwen2TokenizerFast, shortest: int, longest: int
) -> Qwen2_5_VLProcessor:
    """The processor; images are scaled to an area of ``shortest`` to ``longest`` pixels."""
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=PATCH,
            merge_size=MERGE,
            temporal_patch_size=2,
            size={"shortest_edge": shortest, "longest_edge": longest},
        ),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    )


def control_ids(tokenizer: Qwen2TokenizerFast) -> dict[str, Any]:
    """The fields of a model's configuration that name a control token."""
    ids = dict(zip(CONTROL, tokenizer.convert_tokens_to_ids(CONTROL), strict=True))
    return {
        "vision_start_token_id": ids[VISION_START],
        "vision_end_token_id": ids[VISION_END],
        "image_token_id": ids[IMAGE],
        "video_token_id": ids[VIDEO],
    }
