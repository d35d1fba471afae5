"""VQAScore in this process: a tiny random Qwen2.5-VL against plain transformers."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_vlm import build_small_vlm
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from g2rpo.errors import UserError
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.registry import load_reward
from g2rpo.rewards.unified_reward.local import hash_files
from g2rpo.rewards.unified_reward.template import BESIDE_THE_MODEL, question_inputs
from g2rpo.rewards.vqa_score import QUESTION, VQAScore

SIZES = [(28, 28), (64, 40), (90, 30), (33, 80), (112, 112)]
PROMPTS = ["a", "a cat " * 9, "ein Kätzchen, 猫", '{prompt} "q"\n', "x" * 400]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_small_vlm(tmp_path_factory.mktemp("random") / "vlm", scale=15.0)
    (folder / BESIDE_THE_MODEL).unlink()
    return folder


def load(folder: Path, **question: Any) -> VQAScore:
    config = {"model": "vqa_score", "source": str(folder), "question": question or None}
    reward = load_reward(RewardConfig.model_validate(config), "cpu")
    assert isinstance(reward, VQAScore)
    return reward


def pictures() -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (*size, 3), generator=draws, dtype=torch.uint8) for size in SIZES]


def plainly(folder: Path, image: Tensor, prompt: str) -> float:
    """The paper's score by transformers alone, for one image and prompt."""
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    question = f'Does this figure show "{prompt}"? Please answer yes or no.'
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    picture = Image.fromarray(image.numpy())
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    with torch.no_grad():
        logits = network(**inputs).logits[0, -1].double()
    # No token of this vocabulary is the whole word.
    return float(logits.softmax(0)[processor.tokenizer.convert_tokens_to_ids("Y")])


def test_equals_plain_transformers_whatever_the_batch(folder: Path) -> None:
    reward, images = load(folder), pictures()
    expected = torch.tensor([plainly(folder, *pair) for pair in zip(images, PROMPTS, strict=True)])
    assert expected.max() > 2 * expected.min()
    found = reward.score(images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    reward.batch_size = 2
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=1e-4, atol=0)
    assert reward.score([], []).shape == (0,)


def test_an_image_too_wide_for_the_model_is_named(folder: Path) -> None:
    images = [*pictures()[:2], torch.zeros(2, 500, 3, dtype=torch.uint8)]
    message = "image of 500 x 2 pixels for .*a cat.*: absolute aspect ratio .* leave it out"
    with pytest.raises(UserError, match=message):
        load(folder).score(images, ["a dog", "a bird", "a cat"])


def test_prompts_are_scored_whole(folder: Path) -> None:
    reward, image, long = load(folder), pictures()[:1], "a red square, " * 100
    assert reward.too_long([long]) == [False]
    ends = [reward.score(image, [long + end]).item() for end in ("cat", "dog")]
    assert ends[0] != pytest.approx(ends[1], rel=1e-4)


def test_names_what_was_measured(folder: Path, tmp_path: Path) -> None:
    reward = load(folder)
    assert (reward.name, reward.version, reward.columns) == ("vqa_score", "vlm-yes", ("vqa_score",))
    assert reward.weights_hash == hash_files(folder, ("model.safetensors",))
    halved = load(folder, dtype="bfloat16")
    assert halved.version == "vlm-bfloat16-yes"
    assert halved.settings != reward.settings == load(folder).settings
    copy = tmp_path / "vlm"
    shutil.copytree(folder, copy)
    template = next(copy.glob("*.jinja"))
    template.write_text(template.read_text() + " ")
    assert load(copy).settings != reward.settings
    assert reward.template_hash == hashlib.sha256(QUESTION.text.encode()).hexdigest()
    assert [id(network) for network in reward.networks()] == [id(reward.backend.network)]  # type: ignore[union-attr]
    path = tmp_path / "question.txt"
    path.write_text("Is this {prompt}?")
    other = load(folder, template=str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert other.template_hash == digest
    assert other.score(pictures(), PROMPTS).tolist() != reward.score(pictures(), PROMPTS).tolist()
    config = RewardConfig.model_validate(
        {"model": "vqa_score", "question": {"template": str(path)}}
    )
    assert config.question is not None and question_inputs(config.question)["template"] == digest
    with pytest.raises(UserError, match=f"SHA-256 is {digest}, but"):
        load(folder, template=str(path), template_sha256="0" * 64)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"aggregate": "style"}, r"vqa_score: question\.aggregate has no effect; remove it"),
        ({"max_answer_tokens": 8}, r"question\.max_answer_tokens has no effect"),
        ({"cache": False}, r"question\.cache has no effect"),
        (
            {"template": "published"},
            "'published' is UnifiedReward's; remove it, or set it to a file",
        ),
        ({"template": "nowhere.txt"}, r"nowhere\.txt: cannot read the template"),
    ],
)
def test_settings_without_effect_are_refused(
    folder: Path, question: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(folder, **question)


def test_published_weights_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot fetch Qwen/.*weights fetch Qwen/.*set `source`"):
        load_reward(RewardConfig(model="vqa_score"), "cpu")
    with pytest.raises(UserError, match="vqa_score: has no variants"):
        load_reward(RewardConfig(model="vqa_score", variant="7b"), "cpu")
