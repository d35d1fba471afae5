"""A tiny random Qwen2.5-VL, and a tiny HPSv3, in the files of the large ones, made offline."""

import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import safetensors.torch
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from benchmarks.qwen_files import (
    CHAT,
    MERGE,
    PATCH,
    control_ids,
    qwen_processor,
    qwen_tokenizer,
)
from g2rpo.files import atomic_folder, atomic_write_text, write_json
from g2rpo.rewards import hpsv3
from g2rpo.rewards.unified_reward.template import BESIDE_THE_MODEL, PLACEHOLDER

QUESTION = f"Alignment, Coherence and Style Score (1-5) of the image for: {PLACEHOLDER}"
WIDTH, VISION_WIDTH = 64, 32
ASPECTS = ("Alignment", "Coherence", "Style")
MARKS = ("1", "2.5", "3", "4.5", "5")
CORPUS = [
    QUESTION,
    "system user assistant",
    *(f"{aspect} Score (1-5): {mark}\n" for aspect in ASPECTS for mark in MARKS),
]
HPSV3_QUESTION = f"Rate the image for: {PLACEHOLDER}\n\nThe rating: {hpsv3.REWARD_TOKEN}\n\nEND\n"
HPSV3_PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    "image_mean": open_clip.OPENAI_DATASET_MEAN,
    "image_std": open_clip.OPENAI_DATASET_STD,
}
TEXT_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
HPSV3_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    **TEXT_SIZES,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 2,
        "embed_dim": VISION_WIDTH,
        "mlp_ratio": 2,
        "num_heads": 2,
        "hidden_size": WIDTH,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    },
}


def build_small_vlm(folder: Path, seed: int = 0, scale: float = 1.0) -> Path:
    """Builds a random network of two layers, its processor and its question in ``folder``.

    ``scale`` multiplies its logits, which are nearly equal.

    Returns:
        ``folder``, as ``unified_reward`` loads it by ``source``.
    """
    with torch.random.fork_rng(devices=[]), atomic_folder(folder) as temporary:
        torch.manual_seed(seed)
        side = PATCH * MERGE
        processor = qwen_processor(qwen_tokenizer(CORPUS), side**2, (4 * side) ** 2)
        processor.save_pretrained(temporary)
        network = _network(processor.tokenizer)
        network.lm_head.weight.data.mul_(scale)
        network.save_pretrained(temporary)
        atomic_write_text(temporary / BESIDE_THE_MODEL, QUESTION)
    return folder


def build_small_hpsv3(folder: Path) -> Path:
    """Builds HPSv3 of two layers with the files, and the names of tensors, of the published one.

    Each tensor's values are drawn by its name, so that they depend on no version of a library.

    Returns:
        ``folder``, as ``hpsv3`` loads it by ``source``.
    """
    with atomic_folder(folder) as temporary:
        tokenizer = qwen_tokenizer([])
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "chat_template.json", {"chat_template": CHAT})
        write_json(temporary / "preprocessor_config.json", HPSV3_PREPROCESSOR)
        config = HPSV3_CONFIG | control_ids(tokenizer)
        config |= {
            "vocab_size": len(tokenizer) + 8,  # rounded up
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        write_json(temporary / "config.json", config)
        atomic_write_text(temporary / BESIDE_THE_MODEL, HPSV3_QUESTION)
        network = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(config))
        with tempfile.TemporaryDirectory() as saved:  # under the names that files have
            network.save_pretrained(saved)
            values = safetensors.torch.load_file(Path(saved) / "model.safetensors")
        shapes = {key: value.shape for key, value in values.items()}
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            shapes[key] = torch.Size((len(tokenizer) + 1, WIDTH))
        head = hpsv3.HPSv3Network(network.config).rm_head.state_dict()
        shapes |= {f"rm_head.{key}": value.shape for key, value in head.items()}
        state = {key: _drawn(key, shape) for key, shape in shapes.items()}
        safetensors.torch.save_file(state, temporary / hpsv3.WEIGHTS)
    return folder


def _drawn(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Normal values of a size that preserves that of activations, rounded to bfloat16."""
    # Of NumPy's generators, the values of this one never change.
    draws = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        size = 1 if "embed_tokens" in name else int(np.prod(shape[1:]))
        values = draws * (2 if name.startswith("rm_head") else 1) / size**0.5
    else:
        values = 0.1 * draws + float(name.endswith("weight"))
    tensor = torch.from_numpy(values).to(torch.bfloat16)
    return tensor.float() if name.startswith("rm_head") else tensor


def _network(tokenizer: Any) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            **TEXT_SIZES,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
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
        tie_word_embeddings=False,
        **control_ids(tokenizer),
    )
    network = Qwen2_5_VLForConditionalGeneration(config).eval()
    network.generation_config.update(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return network
