"""A tiny random Qwen2.5-VL in the files of the large ones, made offline."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from g2rpo.files import atomic_folder, atomic_write_text
from g2rpo.rewards.unified_reward.template import BESIDE_THE_MODEL, PLACEHOLDER

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
CONTROL = [END_OF_TEXT, TURN, END_OF_TURN, VISION_START, VISION_END, IMAGE, VIDEO]
QUESTION = f"Alignment, Coherence and Style Score (1-5) of the image for: {PLACEHOLDER}"
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
WIDTH, VISION_WIDTH = 64, 32
ASPECTS = ("Alignment", "Coherence", "Style")
MARKS = ("1", "2.5", "3", "4.5", "5")
CORPUS = [
    QUESTION,
    "system user assistant",
    *(f"{aspect} Score (1-5): {mark}\n" for aspect in ASPECTS for mark in MARKS),
]


def build_small_vlm(folder: Path, seed: int = 0) -> Path:
    """Builds a random network of two layers, its processor and its question in ``folder``.

    Returns:
        ``folder``, as ``unified_reward`` loads it by ``source``.
    """
    with torch.random.fork_rng(devices=[]), atomic_folder(folder) as temporary:
        torch.manual_seed(seed)
        processor = _processor()
        processor.save_pretrained(temporary)
        _network(processor.tokenizer).save_pretrained(temporary)
        atomic_write_text(temporary / BESIDE_THE_MODEL, QUESTION)
    return folder


def _processor() -> Qwen2_5_VLProcessor:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All bytes, so that any text can be written, and the words of the format as one token each.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=CONTROL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    written = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in written["merges"]]
    fast = Qwen2TokenizerFast(
        vocab=written["vocab"],
        merges=merges,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        additional_special_tokens=CONTROL[1:],
    )
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=PATCH,
            merge_size=MERGE,
            temporal_patch_size=2,
            size={"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": (4 * PATCH * MERGE) ** 2},
        ),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    )


def _network(tokenizer: Any) -> Qwen2_5_VLForConditionalGeneration:
    ids = dict(zip(CONTROL, tokenizer.convert_tokens_to_ids(CONTROL), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
            "bos_token_id": ids[END_OF_TEXT],
            "eos_token_id": ids[END_OF_TURN],
            "pad_token_id": ids[END_OF_TEXT],
        },
        vision_config={
            "depth": 2,
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 2 * VISION_WIDTH,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=False,
    )
    network = Qwen2_5_VLForConditionalGeneration(config).eval()
    network.generation_config.update(
        eos_token_id=[ids[END_OF_TURN], ids[END_OF_TEXT]], pad_token_id=ids[END_OF_TEXT]
    )
    return network
