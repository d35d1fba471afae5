"""Prompt sets, and which prompts an iteration trains on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from g2rpo.errors import UserError
from g2rpo.seeds import permutation


@dataclass(frozen=True)
class Prompt:
    """A prompt and the id that names its noise and its scores.

    Attributes:
        id: the line's number in its file, counted from 0, padded to six digits.
        text: the prompt.
    """

    id: str
    text: str


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Reads one prompt per line; ``limit`` keeps the first ones.

    Raises:
        UserError: the file is missing, not UTF-8, empty, or has an empty line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompt file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; name a file with one prompt per line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; name a file with one prompt per line") from None
    # Not splitlines(): it also breaks at characters that a prompt may hold, e.g. U+2028.
    lines = text.removesuffix("\n").split("\n") if text else []
    prompts = []
    for number, line in enumerate(lines):
        if not line.strip():
            raise UserError(f"{path}, line {number + 1}: empty prompt; remove the line")
        prompts.append(Prompt(f"{number:06d}", line.strip()))
    if not prompts:
        raise UserError(f"{path}: no prompts; write one per line")
    return prompts if limit is None else prompts[:limit]


def prompts_of_iteration(
    prompts: Sequence[Prompt], count: int, seed: int, iteration: int
) -> list[Prompt]:
    """The ``count`` prompts of ``iteration`` (counted from 0), over all ranks.

    Each epoch is a permutation of the set drawn from (seed, epoch) alone; what does not fill an
    iteration at its end is left out, so that the prompts of an iteration are distinct.

    Raises:
        UserError: the set has fewer than ``count`` prompts.
    """
    per_epoch = len(prompts) // count
    if per_epoch == 0:
        raise UserError(
            f"training.prompts_per_iteration is {count} but the prompt set has {len(prompts)}: "
            "lower it or give more prompts"
        )
    epoch, position = divmod(iteration, per_epoch)
    order = permutation(len(prompts), seed, "prompt-order", epoch)
    return [prompts[index] for index in order[position * count : (position + 1) * count]]
