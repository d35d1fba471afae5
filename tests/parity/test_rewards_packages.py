"""The reward models against the packages they stand for, on the same random weights."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from hpsv3_package import PROMPTS as HPSV3_PROMPTS
from hpsv3_package import pictures as hpsv3_pictures
from PIL import Image
from small_aesthetic import build_small_aesthetic
from small_vlm import build_small_hpsv3
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from benchmarks.mini_world.small_rewards import (
    SmallImageReward,
    SmallPickScore,
    liven,
    save_open_clip,
)
from benchmarks.mini_world.tokenizers import words
from benchmarks.reward_packages import hpsv2_open_clip, image_reward_package
from g2rpo.rewards import image_reward
from g2rpo.rewards.aesthetic import HEAD, AestheticScore
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.clip_score import CLIPScore
from g2rpo.rewards.hps import CHECKPOINTS, HPS
from g2rpo.rewards.hpsv3 import WEIGHTS, HPSv3
from g2rpo.rewards.open_clip_reward import WEIGHTS_FILES, build_clip
from g2rpo.rewards.pick_score import PickScore
from g2rpo.rewards.preprocessing import Preprocessing

PROMPTS = ["a large red circle on black", "two blue stars above a green ring on gray"] * 2
TOY_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 224, "patch_size": 56, "width": 32, "layers": 2, "head_width": 8,
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2,
    },
}  # fmt: skip
HPSV3_VALUES = Path(__file__).with_name("hpsv3_package.json")
SHAPES = [(224, 224), (300, 100), (100, 300), (7, 9), (512, 640), (1600, 2200)]


def pictures(height: int, width: int, number: int = 4) -> Tensor:
    draws = torch.Generator().manual_seed(height)
    coarse = torch.randint(0, 256, (number, 3, 5, 5), generator=draws).float()
    image = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = 20 * torch.randn(image.shape, generator=draws)
    return (image + noise).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def as_pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.numpy()) for image in images]


@pytest.fixture(scope="module")
def hpsv2() -> Iterator[Any]:
    """hpsv2's own open_clip."""
    with hpsv2_open_clip() as vendored:
        yield vendored


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_hps_preprocessing_equals_the_package(hpsv2: Any, height: int, width: int) -> None:
    transform = hpsv2.image_transform(224, is_train=False, resize_longest_max=True)
    images = pictures(height, width)
    expected = torch.stack([transform(image) for image in as_pil(images)])
    torch.testing.assert_close(
        Preprocessing(224, "longest_padded")(images), expected, atol=1e-6, rtol=0
    )


def test_hps_equals_the_package(
    hpsv2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published file's path: its key names, its tokenizer, its transform; a toy tower."""
    torch.manual_seed(0)
    package = hpsv2.CLIP(**TOY_CLIP).eval()
    liven(package)
    torch.save({"state_dict": package.state_dict()}, tmp_path / CHECKPOINTS["v2.1"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: TOY_CLIP)
    ours = HPS.load(RewardConfig(model="hps", source=str(tmp_path)), "cpu")
    transform = hpsv2.image_transform(224, is_train=False, resize_longest_max=True)
    tokenize = open_clip.SimpleTokenizer(context_length=77)
    for height, width in SHAPES:
        images = pictures(height, width)
        expected = []
        with torch.no_grad():
            for image, prompt in zip(as_pil(images), PROMPTS, strict=True):
                features = package(transform(image)[None], tokenize([prompt]))[:2]
                expected.append((features[0] @ features[1].T).item())
        scores = ours.score(images, PROMPTS)
        assert scores.std() > 1e-3
        torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)


def test_clip_score_equals_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    clip = build_clip(TOY_CLIP)
    liven(clip)
    save_open_clip(clip, TOY_CLIP, "squash", tmp_path)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "toy", TOY_CLIP)
    model, preprocess = open_clip.create_model_from_pretrained(
        "toy", pretrained=str(tmp_path / WEIGHTS_FILES[0]), image_resize_mode="squash"
    )
    tokenize = open_clip.get_tokenizer("toy")
    ours = CLIPScore.load(RewardConfig(model="clip", source=str(tmp_path)), "cpu")
    for height, width in SHAPES:
        images = pictures(height, width)
        with torch.no_grad():
            pixels = torch.stack([preprocess(image) for image in as_pil(images)])
            found = model.eval().encode_image(pixels, normalize=True)
            expected = found * model.encode_text(tokenize(PROMPTS), normalize=True)
        scores = ours.score(images, PROMPTS)
        assert scores.std() > 1e-3
        torch.testing.assert_close(scores, expected.sum(-1), atol=1e-5, rtol=0)


def test_pick_score_equals_plain_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = SmallPickScore(words())
    liven(small)
    small.save(tmp_path)
    model = CLIPModel.from_pretrained(tmp_path).eval()
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ours = PickScore.load(
        RewardConfig(model="pick_score", source=str(tmp_path), variant="logit"), "cpu"
    )
    for height, width in SHAPES:
        images = pictures(height, width)
        with torch.no_grad():
            pixels = processor(as_pil(images), return_tensors="pt").pixel_values
            torch.testing.assert_close(ours.preprocessing(images), pixels, atol=1e-6, rtol=0)
            tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
            logits = model(
                pixel_values=pixels,
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
            ).logits_per_image.diag()
        scores = ours.score(images, PROMPTS)
        assert scores.std() > 1e-2
        torch.testing.assert_close(scores, logits, atol=1e-5, rtol=1e-5)


def test_image_reward_equals_the_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = SmallImageReward(words())
    vision = {**small.vision_config, "image_size": 224, "patch_size": 56}
    small.vision_config = vision
    small.network = type(small.network)(vision, small.text_config)
    liven(small)
    small.eval().save(tmp_path)
    med_config = tmp_path / "package_med_config.json"
    text = small.text_config
    med_config.write_text(
        json.dumps({**text, "add_cross_attention": True, "hidden_act": "gelu", "fusion": ""})
    )
    with image_reward_package(small.tokenizer, vision) as package:
        _image_reward_agrees(package, small, med_config)


def _image_reward_agrees(package: Any, small: SmallImageReward, med_config: Path) -> None:
    theirs = package.ImageReward(med_config=str(med_config)).eval()
    theirs.mlp = type(theirs.mlp)(small.text_config["hidden_size"])
    result = theirs.load_state_dict(small.network.published_state(), strict=False)
    assert not result.unexpected_keys
    unused = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
    assert all(key.startswith(unused) for key in result.missing_keys)
    theirs.eval()
    ours = image_reward.ImageReward.load(
        RewardConfig(model="image_reward", source=str(med_config.parent)), "cpu"
    )
    for height, width in SHAPES:
        images = pictures(height, width)
        with torch.no_grad():
            expected = [
                theirs.score(prompt, image)
                for prompt, image in zip(PROMPTS, as_pil(images), strict=True)
            ]
        prepared = torch.stack([theirs.preprocess(image) for image in as_pil(images)])
        assert torch.equal(ours.preprocessing(images), prepared)
        scores = ours.score(images, PROMPTS)
        assert scores.std() > 1e-2
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.1)], ids=["float32", "bfloat16"]
)
def test_hpsv3_equals_the_package(tmp_path: Path, variant: str, tolerance: float) -> None:
    """What the package computed is in ``hpsv3_package.json``; ``hpsv3_package.py`` says how."""
    folder = build_small_hpsv3(tmp_path / "hpsv3")
    expected = torch.tensor(json.loads(HPSV3_VALUES.read_text())[variant])
    assert expected.std(0).min() > 5 * tolerance
    images = [torch.from_numpy(picture) for picture in hpsv3_pictures()]

    def scores() -> Tensor:
        config = RewardConfig(model="hpsv3", source=str(folder), variant=variant)
        return HPSv3.load(config, "cpu").score(images, HPSV3_PROMPTS)

    found = scores()
    torch.testing.assert_close(found, expected[:, 0], atol=tolerance, rtol=0)
    # The same weights with the names that newer versions of transformers give them.
    state = safetensors.torch.load_file(folder / WEIGHTS)
    newer = {
        re.sub(
            r"^model\.(?!visual)", "model.language_model.", re.sub("^visual", "model.visual", key)
        ): value
        for key, value in state.items()
    }
    assert newer.keys() != state.keys()
    safetensors.torch.save_file(newer, folder / WEIGHTS)
    assert torch.equal(scores(), found)


def test_aesthetic_equals_the_authors_script(tmp_path: Path) -> None:
    """Their script, written again: CLIP's features, normalised by NumPy, through linear layers."""
    folder = build_small_aesthetic(tmp_path)
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    head = torch.load(folder / f"{HEAD}.pth", weights_only=True)
    ours = AestheticScore.load(RewardConfig(model="aesthetic", source=str(folder)), "cpu")
    for height, width in SHAPES:
        images = pictures(height, width)
        with torch.no_grad():
            pixels = processor(as_pil(images), return_tensors="pt").pixel_values
            found = model.get_image_features(pixel_values=pixels).pooler_output.numpy()
        values = found / np.linalg.norm(found, axis=1, keepdims=True)
        for layer in (0, 2, 4, 6, 7):
            weight, bias = (head[f"layers.{layer}.{name}"].numpy() for name in ("weight", "bias"))
            values = values @ weight.T + bias
        scores = ours.score(images, PROMPTS)
        assert scores.std() > 1e-3
        np.testing.assert_allclose(scores.numpy(), values[:, 0], atol=1e-5)
