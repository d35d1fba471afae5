"""Finding, reading and checking the files of a reward model: a local folder or a hub id.

Weights are read as safetensors or with ``torch.load(weights_only=True)``; nothing is unpickled.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from g2rpo.errors import UserError
from g2rpo.hub.fetch import fetch_first
from g2rpo.hub.lock import revision_of


def locate(source: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The path of the first of ``names`` that ``source`` holds, fetched if ``source`` is a hub id.

    A hub id without a ``revision`` means the one that the catalogue or the lock file pins.

    Raises:
        UserError: none of ``names`` is there or can be fetched, or it is not the file that the
            catalogue or the lock file states; says which, and how to get it.
    """
    folder = Path(source)
    if folder.is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise UserError(f"{source}: the folder has no {' or '.join(names)}")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such folder of reward weights")
    return fetch_first(source, names, revision)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict that ``path`` holds, floating-point tensors as float32 on the CPU."""
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the two readers raise many kinds for a damaged file
        line = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be read as weights ({line}); fetch it again") from None
    state = state.get("state_dict", state)
    return {
        key: value.float() if value.is_floating_point() else value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_state(
    module: nn.Module, state: dict[str, Tensor], path: Path, ignored: Sequence[str] = ()
) -> None:
    """Loads ``state`` into ``module``, then freezes it in evaluation mode.

    ``ignored``: prefixes of keys that the file may hold beyond what the module needs.

    Raises:
        UserError: keys or shapes differ; ``path`` and the first difference are named.
    """
    wanted = module.state_dict()
    given = {key: value for key, value in state.items() if not key.startswith(tuple(ignored))}
    missing = sorted(wanted.keys() - given.keys())
    extra = sorted(given.keys() - wanted.keys())
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has an unknown {extra[0]!r}"
        raise UserError(
            f"{path}: not the weights of this architecture: it {what} "
            f"({len(missing)} keys missing, {len(extra)} unknown)"
        )
    for key, value in given.items():
        if value.shape != wanted[key].shape:
            raise UserError(
                f"{path}: {key!r} has shape {list(value.shape)}, "
                f"but the configuration needs {list(wanted[key].shape)}"
            )
    module.load_state_dict(given)
    module.eval().requires_grad_(False)


def load_tokenizer(source: Path | str) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer at ``source`` (folder or hub id).

    Offline, transformers can return a nearly empty tokenizer without a word: check the number of
    its tokens with :func:`check_vocabulary`.
    """
    pinned = None if Path(source).is_dir() else revision_of(str(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=pinned or "main")
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"{source}: cannot load its tokenizer ({line})") from None
    return cast(PreTrainedTokenizerBase, tokenizer)


def check_vocabulary(source: str, found: int, expected: int) -> None:
    """Raises :class:`UserError` when a tokenizer's size is not the text tower's."""
    if found != expected:
        raise UserError(
            f"{source}: the tokenizer has {found} tokens but the text model expects {expected}; "
            "its files are missing or belong to another model"
        )


class PromptTokenizer:
    """A tokenizer that cuts prompts at ``limit`` tokens (marks included) and says which were."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, limit: int, padding: bool | str = True
    ) -> None:
        self.tokenizer, self.limit, self.padding = tokenizer, limit, padding
        # A fast tokenizer keeps the last call's options in itself: one call at a time.
        self._lock = threading.Lock()

    def __call__(self, prompts: Sequence[str]) -> BatchEncoding:
        """Token ids and masks ``[N, L]``, padded."""
        with self._lock:
            encoded: BatchEncoding = self.tokenizer(
                list(prompts),
                padding=self.padding,
                truncation=True,
                max_length=self.limit,
                return_tensors="pt",
            )
        return encoded

    def too_long(self, prompts: Sequence[str]) -> list[bool]:
        """Whether each prompt has more than ``limit`` tokens."""
        with self._lock:
            ids = self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids
        return [len(tokens) > self.limit for tokens in ids]
