"""What the package hpsv3 1.0.0 computes on the tiny HPSv3, kept in ``hpsv3_package.json``.

The package needs transformers 4.45.2, so today's cannot run it. To compute the file again:

    PYTHONPATH=.:tests python tests/parity/hpsv3_package.py build FOLDER

and then, in an environment of hpsv3 1.0.0 and what it requires,

    python tests/parity/hpsv3_package.py score FOLDER > tests/parity/hpsv3_package.json
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = [(448, 448), (300, 100), (100, 300), (30, 40), (512, 640), (1000, 1400)]
PROMPTS = ["a red cat", "two {blue} stars over a ring", "x", "un été, 猫", "a " * 90, "Wide\nangle"]


def pictures() -> list[np.ndarray]:
    """A uint8 image of coloured squares and noise for each of ``SHAPES``."""
    found = []
    for height, width in SHAPES:
        draws = np.random.RandomState(height)  # whose values never change
        squares = draws.randint(0, 256, (5, 5, 3))
        large = np.kron(squares, np.ones((height // 5, width // 5, 1), int))
        noise = draws.randint(-20, 21, large.shape)
        found.append((large + noise).clip(0, 255).astype(np.uint8))
    return found


def build(folder: Path) -> None:
    """Builds the tiny HPSv3."""
    from small_vlm import build_small_hpsv3

    build_small_hpsv3(folder)


def score(folder: Path) -> dict[str, list[list[float]]]:
    """mu and log sigma as published, and in float32 but with the same rounded rotary angles."""
    import hpsv3.inference
    import safetensors.torch
    import torch
    import yaml
    from PIL import Image

    question = (folder / "question_template.txt").read_text()
    hpsv3.inference.INSTRUCTION = question.replace("{prompt}", "{text_prompt}")
    hpsv3.inference.prompt_with_special_token = ""
    weights = folder / "HPSv3.safetensors"
    state = safetensors.torch.load_file(weights)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    # The model from which the package starts has more rows, and no reward head.
    base = {key: value for key, value in state.items() if not key.startswith("rm_head.")}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        base[key] = torch.zeros(vocabulary, base[key].shape[1], dtype=base[key].dtype)
    published: dict[str, Any] = {
        "rm_head_type": "ranknet",
        "use_special_tokens": True,
        "reward_token": "special",
        "output_dim": 2,
        "bf16": True,
        "torch_dtype": "bfloat16",
        "use_cpu": True,
    }
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(folder, Path(temporary) / "base"))
        safetensors.torch.save_file(base, copy / "model.safetensors", metadata={"format": "pt"})
        config = Path(temporary) / "config.yaml"
        own = {"model_name_or_path": str(copy), "output_dir": str(temporary)}
        config.write_text(yaml.safe_dump(published | own))
        inferencer = hpsv3.inference.HPSv3RewardInferencer(str(config), str(weights), "cpu")
    # On a GPU, autocast hands the head float32.
    inferencer.model.rm_head.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
    images = [Image.fromarray(picture) for picture in pictures()]
    found = {}
    with torch.no_grad():
        found["bfloat16"] = inferencer.reward(images, PROMPTS).tolist()
        inferencer.model.float()
        inferencer.model.visual.rotary_pos_emb.bfloat16()
        found["float32"] = inferencer.reward(images, PROMPTS).tolist()
    return found


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]))
    else:
        print(json.dumps(score(Path(sys.argv[2])), indent=1))
