"""The benchmark's CLIP and BLIP reward models: random weights, and their packages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from benchmarks.mini_world.small_rewards import (
    SmallImageReward,
    liven,
    save_open_clip,
    save_transformers_clip,
    word_tokenizer,
)
from benchmarks.mini_world.tokenizers import words
from benchmarks.reward_packages import hpsv2_open_clip, image_reward_package
from benchmarks.speed.scored import PackageScore, Scored, one_by_one, share
from g2rpo.files import read_json, write_json
from g2rpo.rewards.aesthetic import HEAD
from g2rpo.rewards.image_reward import (
    MED_CONFIG,
    PUBLISHED_VISION,
    VISION_CONFIG,
    ImageRewardNetwork,
    add_blip_tokens,
    linear_head,
)
from g2rpo.rewards.open_clip_reward import CONFIG_FILE, WEIGHTS_FILES, build_clip
from g2rpo.rewards.weights import read_weights

VIT_H, VIT_L = "ViT-H-14", "ViT-L-14-quickgelu"


def _clip_config(name: str, divisor: int) -> dict[str, Any]:
    config: dict[str, Any] = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    for part, keys in ((config, ["embed_dim"]), (vision, ["width", "layers"])):
        part |= {key: share(part[key], divisor) for key in keys}
    text |= {key: share(text[key], divisor) for key in ("width", "heads", "layers")}
    return config


def _write_open_clip(mode: str) -> Callable[[Path, int], None]:
    def write(folder: Path, divisor: int) -> None:
        config = _clip_config(VIT_H, divisor)
        clip = build_clip(config)
        liven(clip)
        save_open_clip(clip, config, mode, folder)

    return write


def _cosine(
    model: Any, transform: Callable[[Image.Image], torch.Tensor], device: torch.device
) -> PackageScore:
    """The score of one image at a time by two CLIP towers, as both packages' READMEs show it."""
    tokenize = open_clip.get_tokenizer(VIT_H)
    model.eval().to(device)

    def score(path: Path, prompt: str) -> float:
        with torch.no_grad():
            pixels = transform(Image.open(path)).unsqueeze(0).to(device)
            image = model.encode_image(pixels, normalize=True)
            text = model.encode_text(tokenize([prompt]).to(device), normalize=True)
            return float((image @ text.T).item())

    return one_by_one(score)


def _load(model: nn.Module, folder: Path) -> nn.Module:
    model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILES[0]), strict=False)
    return model


@contextmanager
def _hpsv2(folder: Path, device: torch.device) -> Iterator[PackageScore]:
    with hpsv2_open_clip() as package:
        model = _load(package.CLIP(**read_json(folder / CONFIG_FILE)["model_cfg"]), folder)
        transform = package.image_transform(224, is_train=False, resize_longest_max=True)
        yield _cosine(model, transform, device)


@contextmanager
def _clip(folder: Path, device: torch.device) -> Iterator[PackageScore]:
    model = _load(build_clip(read_json(folder / CONFIG_FILE)["model_cfg"]), folder)
    transform = open_clip.image_transform(224, is_train=False, resize_mode="squash")
    yield _cosine(model, transform, device)


def _vocabulary(size: int) -> list[str]:
    """The words of the prompts, and others up to ``size``."""
    return [*words(), *(f"word{number}" for number in range(size - len(words())))]


def _transformers_sizes(heads: int, head_width: int, layers: int, divisor: int) -> dict[str, Any]:
    width = head_width * share(heads, divisor)
    return {
        "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": share(layers, divisor), "num_attention_heads": share(heads, divisor),
    }  # fmt: skip


def _write_transformers_clip(
    folder: Path, vision: dict[str, Any], text: dict[str, Any], projection: int
) -> None:
    tokenizer = word_tokenizer(_vocabulary(49408 - 5))
    text |= {
        "vocab_size": len(tokenizer), "max_position_embeddings": 77,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision |= {"image_size": 224, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    clip = CLIPModel(config)
    liven(clip)
    save_transformers_clip(clip, tokenizer, folder)


def _write_pick_score(folder: Path, divisor: int) -> None:
    vision = _transformers_sizes(16, 80, 32, divisor) | {"hidden_act": "gelu"}
    text = _transformers_sizes(16, 64, 24, divisor) | {"hidden_act": "gelu"}
    _write_transformers_clip(folder, vision, text, share(1024, divisor))


@contextmanager
def _pick_score(folder: Path, device: torch.device) -> Iterator[PackageScore]:
    model = CLIPModel.from_pretrained(folder).eval().to(device)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(path: Path, prompt: str) -> float:  # as the model card does
        pixels = processor(images=[Image.open(path)], return_tensors="pt").to(device)
        tokens = tokenizer(
            [prompt], padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.no_grad():
            image = model.get_image_features(**pixels).pooler_output
            text = model.get_text_features(
                input_ids=tokens.input_ids.to(device),
                attention_mask=tokens.attention_mask.to(device),
            ).pooler_output
            return float(torch.cosine_similarity(image, text).item())

    yield one_by_one(score)


def _write_image_reward(folder: Path, divisor: int) -> None:
    small = SmallImageReward(_vocabulary(30524 - 8))
    small.vision_config = PUBLISHED_VISION | _transformers_sizes(16, 64, 24, divisor)
    small.text_config |= {
        **_transformers_sizes(12, 64, 12, divisor), "max_position_embeddings": 512,
    }  # fmt: skip
    small.network = ImageRewardNetwork(small.vision_config, small.text_config)
    liven(small.network)
    small.save(folder)


@contextmanager
def _image_reward(folder: Path, device: torch.device) -> Iterator[PackageScore]:
    vision, text = read_json(folder / VISION_CONFIG), read_json(folder / MED_CONFIG)
    settings = folder / "package_med_config.json"
    write_json(settings, text | {"add_cross_attention": True, "hidden_act": "gelu", "fusion": ""})
    tokenizer = add_blip_tokens(AutoTokenizer.from_pretrained(folder))
    with image_reward_package(tokenizer, vision) as package:
        model = package.ImageReward(med_config=str(settings), device=str(device))
        model.mlp = type(model.mlp)(text["hidden_size"])
        weights = safetensors.torch.load_file(folder / "image_reward.safetensors")
        model.load_state_dict(weights, strict=False)
        model.eval().to(device)

        def score(path: Path, prompt: str) -> float:
            with torch.no_grad():
                return float(model.score(prompt, str(path)))

        yield one_by_one(score)


def save_aesthetic_head(folder: Path, width: int) -> None:
    """Saves a random head for features ``[N, width]`` under the published name."""
    head = linear_head(width)
    liven(head)
    state = {f"layers.{key}": value for key, value in head.state_dict().items()}
    torch.save(state, folder / f"{HEAD}.pth")


def _write_aesthetic(folder: Path, divisor: int) -> None:
    vision, text = (
        _transformers_sizes(heads, 64, layers, divisor) for heads, layers in ((16, 24), (12, 12))
    )
    width = share(768, divisor)
    _write_transformers_clip(folder, vision, text, width)
    save_aesthetic_head(folder, width)


_OPEN_CLIP_NAMES = (
    ("encoder.layers.", "transformer.resblocks."),
    ("self_attn.", "attn."),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("embeddings.patch_embedding", "conv1"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.class_embedding", "class_embedding"),
    ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"),
)
"""Names of a vision tower's parameters in transformers and in open_clip."""


def _open_clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a CLIPModel's vision tower as open_clip names and joins them."""
    found = {"proj": state["visual_projection.weight"].T}
    for key, value in state.items():
        if not key.startswith("vision_model."):
            continue
        name = key.removeprefix("vision_model.")
        for theirs, ours in _OPEN_CLIP_NAMES:
            name = name.replace(theirs, ours)
        if "attn.q_proj" in name:
            joined = [state[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            found[name.replace("q_proj.", "in_proj_")] = torch.cat(joined)
        elif "k_proj" not in name and "v_proj" not in name:
            found[name] = value
    return found


@contextmanager
def _aesthetic(folder: Path, device: torch.device) -> Iterator[PackageScore]:
    config = read_json(folder / "config.json")
    divisor = 1024 // config["vision_config"]["hidden_size"]
    tower = build_clip(_clip_config(VIT_L, divisor)).visual.eval().to(device)
    tower.load_state_dict(_open_clip_state(read_weights(folder / "model.safetensors")))
    head = linear_head(config["projection_dim"]).eval().to(device)
    state = read_weights(folder / f"{HEAD}.pth")
    head.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    transform = open_clip.image_transform(224, is_train=False)

    def score(path: Path, prompt: str) -> float:  # as LAION's script does
        del prompt
        with torch.no_grad():
            features = tower(transform(Image.open(path)).unsqueeze(0).to(device)).cpu().numpy()
            unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
            return float(head(torch.from_numpy(unit).to(device)).item())

    yield one_by_one(score)


TOWERS = {
    "hps": Scored("hpsv2's open_clip", _write_open_clip("longest_padded"), _hpsv2),
    "clip": Scored("open_clip", _write_open_clip("squash"), _clip),
    "pick_score": Scored("its model card's code", _write_pick_score, _pick_score),
    "image_reward": Scored("ImageReward", _write_image_reward, _image_reward),
    "aesthetic": Scored("LAION's script, with open_clip", _write_aesthetic, _aesthetic),
}
