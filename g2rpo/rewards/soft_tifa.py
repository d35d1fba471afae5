"""Soft-TIFA: how sure a vision-language model is of each part of a prompt (arXiv 2512.16853).

The published scoring of GenEval 2: a prompt has questions with expected answers, and the score of a
question is the probability of its answer. As the authors' evaluation.py, "... Answer in one word."
is asked, and the answer is the first token of "Yes", "yes", " yes" or " Yes"; to "How many ..." it
is that of the number as a word or digit, capitalised or not, with or without a space before it.
Where spellings share their first token it counts once. Over a server, spellings that are not listed
count as 0.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from g2rpo.errors import UserError, reason
from g2rpo.files import sha256_file
from g2rpo.rewards.base import RewardConfig, question_of
from g2rpo.rewards.unified_reward.template import Template
from g2rpo.rewards.vqa_score import Asked, VQAScore

YES = ("Yes", "yes", " yes", " Yes")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
Question = tuple[str, tuple[str, ...]]
"""A question, and the spellings of its answer."""


def spellings(question: str, answer: str) -> tuple[str, ...]:
    """The answers that count as ``answer``, as published."""
    if not question.startswith("How many"):
        return YES
    words = [answer, answer.capitalize()]
    if answer in NUMBERS:
        words.append(str(NUMBERS.index(answer) + 1))
    return tuple(space + word for space in ("", " ") for word in words)


def read_questions(path: Path) -> dict[str, list[Question]]:
    """The questions of each prompt: the key ``vqa_list`` of the lines of a JSON Lines file.

    Raises:
        UserError: the file cannot be read, or a line has no prompt or questions; names it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the questions ({reason(error)})") from None
    questions: dict[str, list[Question]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text, pairs = entry["prompt"].strip(), list(entry["vqa_list"])
            json.dumps([text, pairs], ensure_ascii=False).encode()  # fails for lone surrogates
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            text, pairs = "", []
        if not (text and pairs and all(map(_is_question, pairs))):
            raise UserError(
                f"{path}, line {number}: expected a prompt and a vqa_list of questions with "
                'answers, in Unicode: [["Are the cows red?", "Yes"], ["How many cows?", "two"]]; '
                'only "How many" may have an answer other than Yes'
            )
        known = [(question, spellings(question, answer)) for question, answer in pairs]
        if questions.setdefault(text, known) != known:
            raise UserError(
                f"{path}, line {number}: other questions for the prompt {text!r} than before"
            )
    if not questions:
        raise UserError(f"{path}: no questions")
    return questions


def _is_question(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
        return False
    question, answer = pair
    return bool(question.strip() and answer.strip()) and (
        question.startswith("How many") or answer in YES
    )


class SoftTIFA(VQAScore):
    """The arithmetic mean of the questions' scores, 0 to 1, and their geometric mean ``gm``."""

    name = "soft_tifa"
    part_names = ("gm",)
    has_questions = True
    published = "Qwen/Qwen3-VL-8B-Instruct"
    default_question = Template.of("{prompt} Answer in one word.")
    suffix = "soft-tifa"
    questions: Mapping[str, Sequence[Question]] = {}

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """See :meth:`VQAScore.load`; reads ``questions`` first.

        Raises:
            UserError: as there, or there are no questions.
        """
        path = _questions_file(config)
        questions = read_questions(path)
        reward = super().load(config, device)
        reward.questions = questions
        asked = f"{reward.template.sha256} {sha256_file(path)}"
        reward.template_hash = hashlib.sha256(asked.encode()).hexdigest()
        return reward

    @classmethod
    def unscorable(cls, config: RewardConfig, prompts: Iterable[str]) -> dict[str, str]:
        path = _questions_file(config)
        known = read_questions(path)
        return {p: f"{path} has no questions about it" for p in prompts if p not in known}

    def prepare(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Any:
        """See :meth:`BatchedReward.prepare`; at most as many questions at once as images."""
        counts, asked = [], []
        for image, prompt in zip(images, prompts, strict=True):
            if prompt not in self.questions:
                raise UserError(f"reward soft_tifa: no questions for the prompt {prompt!r}")
            counts.append(len(self.questions[prompt]))
            asked += [(image, prompt, *each) for each in self.questions[prompt]]
        parts = [asked[start : start + len(images)] for start in range(0, len(asked), len(images))]
        return counts, [self._ask_about(*zip(*part, strict=True)) for part in parts]

    def evaluate(self, prepared: tuple[list[int], list[Asked]]) -> Tensor:
        """Scores ``[B, 2]``: the arithmetic and the geometric mean."""
        counts, parts = prepared
        scores = torch.cat([self._probabilities(part).double().cpu() for part in parts])
        means = [(own.mean(), own.log().mean().exp()) for own in scores.split(counts)]
        return torch.tensor(means)


def _questions_file(config: RewardConfig) -> Path:
    questions = question_of(config).questions
    if questions is None:
        raise UserError(
            "reward soft_tifa: needs the questions of its prompts; run `g2rpo prompts fetch "
            "geneval2` and set soft_tifa.questions=data/prompts/geneval2.jsonl"
        )
    return Path(questions).expanduser()
