"""Soft-TIFA: a tiny random Qwen2.5-VL against the published loop, in float64."""

import json
import math
from collections.abc import Sequence
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
from g2rpo.rewards.registry import check_prompts, load_reward, reward_class
from g2rpo.rewards.soft_tifa import SoftTIFA, spellings
from g2rpo.rewards.unified_reward.template import BESIDE_THE_MODEL, question_inputs

SIZES = [(28, 28), (64, 40), (90, 30)]
ENTRIES: list[dict[str, Any]] = [
    {
        "prompt": "two red cows, and a clock",
        "vqa_list": [
            ["How many cows are in the image?", "two"],
            ["Are the cows red?", "Yes"],
            ["How many clocks are in the image?", "one"],
            ["Are there any clocks in the image?", "Yes"],
            ["Are the cows behind the clock?", "Yes"],
        ],
    },
    {"prompt": "a cat", "vqa_list": [["Are there any cats in the image?", "Yes"]]},
    {"prompt": "{prompt} 猫", "vqa_list": [["How many 猫?", "dozens"], ["Is it red?", "Yes"]]},
]
PROMPTS = [entry["prompt"] for entry in ENTRIES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_small_vlm(tmp_path_factory.mktemp("random") / "vlm", scale=15.0)
    (folder / BESIDE_THE_MODEL).unlink()
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "set.jsonl"
    lines = [json.dumps(entry | {"id": str(n)}) for n, entry in enumerate(ENTRIES)]
    path.write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    return path


def config_of(folder: Path, questions: Path | None, **settings: Any) -> RewardConfig:
    settings |= {} if questions is None else {"questions": str(questions)}
    return RewardConfig.model_validate(
        {"model": "soft_tifa", "source": str(folder), "batch_size": 3} | settings
    )


def pictures() -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (*size, 3), generator=draws, dtype=torch.uint8) for size in SIZES]


def published(folder: Path, image: Tensor, pairs: Sequence[Sequence[str]]) -> list[float]:
    """The scores of the authors' loop, for one image; a shared first token counts once."""
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    digits = {"one": "1", "two": "2"}
    scores = []
    for question, answer in pairs:
        forms = {"Yes", "yes", " yes", " Yes"}
        if question.startswith("How many"):
            forms = {answer, answer.capitalize(), " " + answer, " " + answer.capitalize()}
            if answer in digits:
                forms |= {digits[answer], " " + digits[answer]}
        content = [{"type": "image"}, {"type": "text", "text": f"{question} Answer in one word."}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        picture = Image.fromarray(image.numpy())
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
        with torch.no_grad():
            probabilities = network(**inputs).logits[0, -1].double().softmax(0)
        firsts = {processor.tokenizer.encode(form)[0] for form in forms}
        scores.append(sum(probabilities[token].item() for token in firsts))
    return scores


def test_equals_the_published_loop_whatever_the_batch(folder: Path, questions: Path) -> None:
    reward, images = load_reward(config_of(folder, questions), "cpu"), pictures()
    atoms = [
        published(folder, image, entry["vqa_list"])
        for image, entry in zip(images, ENTRIES, strict=True)
    ]
    means = torch.tensor([[sum(own) / len(own), math.prod(own) ** (1 / len(own))] for own in atoms])
    assert (means[0, 0] - means[0, 1]).abs() > 1e-3 * means[0, 0]
    assert reward.columns == ("soft_tifa", "soft_tifa.gm")
    for size in (1, 2, 3):
        rows = [
            reward.score_prepared(reward.prepare(images[at], PROMPTS[at]), PROMPTS[at])
            for at in (slice(start, start + size) for start in range(0, 3, size))
        ]
        torch.testing.assert_close(torch.cat(rows), means, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("atoms", "mean", "gm"),
    [([0.5, 0.5], 0.5, 0.5), ([0.25, 1.0], 0.625, 0.5), ([0.0, 1.0], 0.5, 0.0), ([0.3], 0.3, 0.3)],
)
def test_the_means_in_closed_form(
    folder: Path,
    questions: Path,
    monkeypatch: pytest.MonkeyPatch,
    atoms: list[float],
    mean: float,
    gm: float,
) -> None:
    reward = load_reward(config_of(folder, questions), "cpu")
    monkeypatch.setattr(SoftTIFA, "_probabilities", lambda self, asked: torch.tensor(asked))
    found = reward.evaluate(([len(atoms)], [[atom] for atom in atoms]))
    torch.testing.assert_close(found.float(), torch.tensor([[mean, gm]]))


def test_the_spellings_of_an_answer() -> None:
    assert spellings("Are the cows red?", "Yes") == ("Yes", "yes", " yes", " Yes")
    found = spellings("How many cows are in the image?", "ten")
    assert found == ("ten", "Ten", "10", " ten", " Ten", " 10")
    assert spellings("How many?", "dozens") == ("dozens", "Dozens", " dozens", " Dozens")


def test_what_was_asked_is_part_of_the_score(folder: Path, questions: Path) -> None:
    config = config_of(folder, questions)
    reward = load_reward(config, "cpu")
    assert reward.version == "vlm-soft-tifa"
    assert config.question is not None
    before = reward.template_hash, question_inputs(config.question)["questions"]
    questions.write_text(questions.read_text().replace("red", "blue"))
    after = load_reward(config, "cpu").template_hash, question_inputs(config.question)["questions"]
    assert all(one is not None and one != two for one, two in zip(before, after, strict=True))


def test_a_prompt_without_questions_is_refused_before_anything_is_loaded(
    tmp_path: Path, questions: Path
) -> None:
    config = config_of(tmp_path / "no model", questions)
    assert reward_class(config).unscorable(config, PROMPTS) == {}
    found = reward_class(config).unscorable(config, ["a cat", "b", "c", "b"])
    assert found == dict.fromkeys("bc", f"{questions} has no questions about it")
    with pytest.raises(UserError, match=r"soft_tifa: cannot score the prompt 'b': .* no questions"):
        check_prompts([config], ["a cat", "b"])
    with pytest.raises(UserError, match="needs the questions of its prompts; run `g2rpo prompts f"):
        load_reward(config_of(tmp_path, None), "cpu")
    for model, reason in (("vqa_score", "asks one question; remove"), ("hps", "asks no question")):
        other = RewardConfig.model_validate({"model": model, "questions": str(questions)})
        with pytest.raises(UserError, match=f"reward {model}: {reason}"):
            load_reward(other, "cpu")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '["a"]',
        '{"prompt": "a"}',
        '{"prompt": " ", "vqa_list": [["Red?", "Yes"]]}',
        '{"prompt": "a", "vqa_list": []}',
        r'{"prompt": "a", "vqa_list": [["Red \ud800?", "Yes"]]}',
        '{"prompt": "a", "vqa_list": [["Red?"]]}',
        '{"prompt": "a", "vqa_list": [["What colour?", "red"]]}',
        '{"prompt": "a", "vqa_list": [["How many?", 2]]}',
    ],
)
def test_lines_without_questions_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "b", "vqa_list": [["Red?", "Yes"]]}\n\n' + line)
    with pytest.raises(UserError, match=r"set\.jsonl, line 3: expected a prompt and a vqa_list"):
        load_reward(config_of(tmp_path, path), "cpu")
    path.write_text("\n")
    with pytest.raises(UserError, match="no questions"):
        load_reward(config_of(tmp_path, path), "cpu")
