"""The benchmark's vision-language reward models: random weights, and their authors' loops.

Questions and answers have about the lengths of the published ones. The networks are random, but
their last layers are made so that answers have the form that is asked for.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from benchmarks.evaluation.scoring.items import Item
from benchmarks.mini_world.small_rewards import liven
from benchmarks.qwen_files import control_ids, qwen_processor, qwen_tokenizer, token
from benchmarks.speed.scored import PROMPT, PackageScore, Scored, one_by_one, share
from g2rpo.rewards import hpsv3
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.question import ASPECTS
from g2rpo.rewards.registry import load_reward
from g2rpo.rewards.soft_tifa import Question, SoftTIFA, spellings
from g2rpo.rewards.unified_reward.answers import read_scores
from g2rpo.rewards.unified_reward.template import BESIDE_THE_MODEL, PLACEHOLDER, Template
from g2rpo.rewards.vqa_score import ANSWER, QUESTION

ANSWER_TOKENS = 64
"""Tokens of an answer of UnifiedReward, with its end."""
HPSV3_BATCH = 8
"""Batch size of the package's ``evaluate.py``."""
LIKELY = 60.0
"""Scale of the logits with which the network chooses its answer."""
QUESTIONS = "questions.jsonl"
TOKENS, ROWS = 151_665, 152_064
"""Tokens of Qwen2-VL's tokenizer, and rows of its embedding, which are rounded up."""
_QUESTIONS = {
    "hpsv3": f"{'word ' * 440}{PLACEHOLDER} {hpsv3.REWARD_TOKEN}",
    "unified_reward": f"{'word ' * 330}{PLACEHOLDER}",
    "vqa_score": QUESTION.text,
    "soft_tifa": SoftTIFA.default_question.text,
}
_ATOMS = (
    ("How many circles are in the image?", "two"),
    ("Are the circles red?", "Yes"),
    ("Is the star blue?", "Yes"),
)
"""Questions about every prompt of the benchmark, and their answers."""


def _grade(aspect: str, mark: int) -> str:
    return f"\n{aspect.capitalize()} Score (1-5): {mark}"


_GRADES = [[_grade(aspect, mark) for mark in range(1, 6)] for aspect in ASPECTS]
_WORDS = [[f" word{number}"] for number in range(ANSWER_TOKENS - len(_GRADES) - 1)]
_ANSWERS = {
    "unified_reward": [*_WORDS, *_GRADES],
    "vqa_score": [[ANSWER, "No"]],
    "soft_tifa": [[ANSWER, "No", "two"]],
}
"""For each token of an answer, those between which the network chooses."""


def _tokenizer() -> Qwen2TokenizerFast:
    """A token for each word of the questions, and as many tokens as Qwen2-VL's in all."""
    atoms = [question for question, _ in _ATOMS]
    corpus = [*_QUESTIONS.values(), *atoms, PROMPT, "0 1 2 3", "user assistant", "Yes No"]
    grades = [text for each in _GRADES for text in each]
    learned = qwen_tokenizer(corpus, learned=2000)
    more = [f" word{number}" for number in range(TOKENS - len(learned) - len(grades))]
    return qwen_tokenizer(corpus, learned=2000, more=[*grades, *more])


def _sizes(divisor: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Qwen2-VL-7B's sizes divided by ``divisor``: of the language model and of the vision tower."""
    heads, vision_heads = share(28, divisor), share(16, divisor)
    text = {
        "hidden_size": 128 * heads, "intermediate_size": share(18944, divisor),
        "num_hidden_layers": share(28, divisor), "num_attention_heads": heads,
        "num_key_value_heads": share(4, divisor), "vocab_size": ROWS, "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
        },
    }  # fmt: skip
    vision = {
        "depth": share(32, divisor), "num_heads": vision_heads, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    return text, vision


def _built(build: Callable[[], Any]) -> Any:
    """A random network in bfloat16, on a GPU if there is one: billions of numbers take minutes."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network = build()
        liven(network)
    return network.to(torch.bfloat16)


@torch.no_grad()
def _answer_with(network: Any, tokenizer: Qwen2TokenizerFast, answer: list[list[str]]) -> None:
    """Makes ``network`` choose each token of its answer from a list, as ``answer`` has them."""
    texts = [["\n"], *answer, [tokenizer.eos_token]]  # a turn of the model follows a line's end
    steps = [tokenizer.convert_tokens_to_ids([token(text) for text in each]) for each in texts]
    embedding, head = network.get_input_embeddings().weight, network.lm_head.weight
    for before, after in pairwise(steps):
        first = embedding[before[0]].clone()
        embedding[before] = first  # whichever was chosen, the next is the same
        head[after] += LIKELY / len(first) * first


def _write_question(folder: Path, name: str) -> Qwen2TokenizerFast:
    """Writes the processor and the question; returns the tokenizer."""
    tokenizer = _tokenizer()
    qwen_processor(tokenizer, 56 * 56, 28 * 28 * 16384).save_pretrained(folder)
    (folder / BESIDE_THE_MODEL).write_text(_QUESTIONS[name])
    return tokenizer


def _write_qwen2_5(name: str) -> Callable[[Path, int], None]:
    def write(folder: Path, divisor: int) -> None:
        tokenizer = _write_question(folder, name)
        if name == "soft_tifa":
            entries = [{"prompt": PROMPT.format(number), "vqa_list": _ATOMS} for number in range(4)]
            (folder / QUESTIONS).write_text("\n".join(map(json.dumps, entries)))
        text, vision = _sizes(divisor)
        vision |= {
            "hidden_size": 80 * vision["num_heads"], "intermediate_size": share(3420, divisor),
            "out_hidden_size": text["hidden_size"], "window_size": 112,
            # One layer in eight, as published; the last of fewer.
            "fullatt_block_indexes": [*range(7, vision["depth"], 8)] or [vision["depth"] - 1],
        }  # fmt: skip
        config = Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False,
            **control_ids(tokenizer),
        )  # fmt: skip
        network = _built(lambda: Qwen2_5_VLForConditionalGeneration(config))
        _answer_with(network, tokenizer, _ANSWERS[name])
        network.generation_config.update(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        network.save_pretrained(folder)

    return write


def _write_hpsv3(folder: Path, divisor: int) -> None:
    tokenizer = _write_question(folder, "hpsv3")
    text, vision = _sizes(divisor)
    vision |= {
        "embed_dim": 80 * vision["num_heads"], "mlp_ratio": 4, "hidden_size": text["hidden_size"],
    }  # fmt: skip
    text["vocab_size"] = len(tokenizer) + 1  # the reward's token
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **control_ids(tokenizer)
    )
    config.save_pretrained(folder)
    network = _built(lambda: hpsv3.HPSv3Network(config))
    safetensors.torch.save_file(network.state_dict(), folder / hpsv3.WEIGHTS)


def _dtype(device: torch.device) -> torch.dtype:
    """The published precision on a GPU; many CPUs are slow in it."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _chat(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return text


@contextmanager
def _generator(
    folder: Path, device: torch.device, **options: Any
) -> Iterator[Callable[[Path, str], tuple[Any, torch.Tensor, Any]]]:
    """Asks about one image at a time through transformers, as Qwen's model cards show it.

    Yields a function of an image and a question that returns the processor, the new tokens ``[L]``
    and all that ``generate`` returned.
    """
    network = AutoModelForImageTextToText.from_pretrained(folder, dtype=_dtype(device))
    network.eval().to(device)
    processor = AutoProcessor.from_pretrained(folder)

    def generate(path: Path, question: str) -> tuple[Any, torch.Tensor, Any]:
        inputs = processor(
            text=[_chat(processor, question)],
            images=[Image.open(path)],
            padding=True,
            return_tensors="pt",
        ).to(device)
        with torch.no_grad():
            output = network.generate(**inputs, return_dict_in_generate=True, **options)
        return processor, output.sequences[0, inputs["input_ids"].shape[1] :], output

    yield generate


@contextmanager
def _unified_reward(folder: Path, device: torch.device) -> Iterator[PackageScore]:
    template = Template.read(folder / BESIDE_THE_MODEL)
    with _generator(folder, device, max_new_tokens=4096) as generate:

        def score(path: Path, prompt: str) -> float:
            processor, tokens, _ = generate(path, template.question(prompt))
            return fmean(read_scores(processor.decode(tokens, skip_special_tokens=True), 1, 5))

        yield one_by_one(score)


def _first_token(
    questions: Callable[[str], Sequence[Question]],
) -> Callable[[Path, torch.device], Any]:
    """The mean probability of the expected first tokens over a prompt's questions."""

    @contextmanager
    def package(folder: Path, device: torch.device) -> Iterator[PackageScore]:
        template = Template.read(folder / BESIDE_THE_MODEL)
        with _generator(folder, device, max_new_tokens=1, output_scores=True) as generate:

            def probability(path: Path, question: str, answers: Sequence[str]) -> float:
                processor, _, output = generate(path, template.question(question))
                tokens = {processor.tokenizer.encode(answer)[0] for answer in answers}
                found = output.scores[0][0].float().softmax(-1)[list(tokens)]
                return float(found.sum().item())

            def score(path: Path, prompt: str) -> float:
                return fmean(probability(path, *each) for each in questions(prompt))

            yield one_by_one(score)

    return package


@contextmanager
def _hpsv3(folder: Path, device: torch.device) -> Iterator[PackageScore]:
    """``HPSv3RewardInferencer`` of hpsv3 1.0.0, written again: it needs transformers 4.45.2."""
    options = VLMS["hpsv3"].options.get(device.type, {})
    ours: Any = load_reward(RewardConfig(model="hpsv3", source=str(folder), **options), device)
    network, reward_token = ours.network, ours.reward_token
    processor = AutoProcessor.from_pretrained(folder, padding_side="right")
    processor.tokenizer.add_tokens([hpsv3.REWARD_TOKEN])
    question = Template.read(folder / BESIDE_THE_MODEL)

    def picture(path: Path) -> Image.Image:
        image, pixels = Image.open(path).convert("RGB"), hpsv3.PIXELS
        size = smart_resize(image.height, image.width, min_pixels=pixels, max_pixels=pixels)
        return image.resize(size[::-1], Image.Resampling.BICUBIC)

    def batch_scores(items: Sequence[Item]) -> list[float]:
        inputs = processor(
            text=[_chat(processor, question.question(item.prompt)) for item in items],
            images=[picture(item.image) for item in items],
            padding=True,
            return_tensors="pt",
        ).to(device)
        ids = inputs["input_ids"]
        positions = torch.arange(ids.shape[1], device=device).expand(3, *ids.shape)
        with torch.no_grad():
            output = network.model(**inputs, position_ids=positions, use_cache=False)
            rewards = network.rm_head(output.last_hidden_state.float())  # of every token
        found: list[float] = rewards[ids == reward_token][:, 0].tolist()
        return found

    def score(items: Sequence[Item]) -> list[float]:
        starts = range(0, len(items), HPSV3_BATCH)
        batches = [batch_scores(items[start : start + HPSV3_BATCH]) for start in starts]
        return [found for batch in batches for found in batch]

    yield score


_NO_CACHE = {"question": {"cache": False}}
VLMS = {
    "hpsv3": Scored(
        f"hpsv3 1.0.0's loop, written again around our network; {HPSV3_BATCH} images at a time",
        _write_hpsv3, _hpsv3, billions=True, options={"cpu": {"variant": "float32"}},
    ),
    "unified_reward": Scored(
        f"its authors' script; answers of {ANSWER_TOKENS} tokens",
        _write_qwen2_5("unified_reward"),
        _unified_reward,
        billions=True, options={"cpu": _NO_CACHE, "cuda": _NO_CACHE},
    ),
    "vqa_score": Scored(
        "t2v_metrics 3.0's loop, written again",
        _write_qwen2_5("vqa_score"),
        _first_token(lambda prompt: [(prompt, (ANSWER,))]),
        billions=True,
    ),
    "soft_tifa": Scored(
        f"GenEval 2's loop, written again; {len(_ATOMS)} questions about an image",
        _write_qwen2_5("soft_tifa"),
        _first_token(lambda _: [(each[0], spellings(*each)) for each in _ATOMS]),
        billions=True, questions=QUESTIONS,
    ),
}  # fmt: skip
