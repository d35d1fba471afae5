"""Finds, reads and checks the files of a reward model, in a folder or on the hub.

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

from g2rpo.errors import UserError, reason
from g2rpo.hub.fetch import fetch_first
from g2rpo.hub.lock import revision_of
from g2rpo.weights import check_shapes


def is_hub_id(source: str) -> bool:
    """Whether ``source`` is neither a folder nor looks like a path."""
    path_like = source.startswith((".", "/", "~")) or source.count("/") > 1
    return not path_like and not Path(source).is_dir()


def locate(source: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The path of the first of ``names`` in ``source``, downloaded if ``source`` is a hub id.

    ``revision`` None is the one pinned by the catalogue or the lock file.

    Raises:
        UserError: none of ``names`` is there or can be downloaded, or it is not the file in the
            catalogue or the lock file; says how to get it.
    """
    folder = Path(source)
    if folder.is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise UserError(f"{source}: the folder has no {' or '.join(names)}")
    if not is_hub_id(source):
        raise UserError(f"{source}: no such folder of reward weights")
    return fetch_first(source, names, revision)


def read_weights(path: Path, *, as_float32: bool = True) -> dict[str, Tensor]:
    """The state dict in ``path`` on the CPU, floating-point tensors as float32 or as stored."""
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # both readers raise many kinds for damaged files
        raise UserError(
            f"{path}: cannot read the weights ({reason(error)}); fetch it again"
        ) from None
    state = state.get("state_dict", state)
    return {
        key: value.float() if as_float32 and value.is_floating_point() else value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_state(
    module: nn.Module, state: dict[str, Tensor], path: Path, ignored: Sequence[str] = ()
) -> None:
    """Loads ``state`` into ``module``, then freezes it in evaluation mode.

    A module on the meta device takes over the tensors of ``state``.

    ``ignored``: prefixes of keys in the file that the module does not need.

    Raises:
        UserError: keys or shapes differ; names ``path`` and the first difference.
    """
    given = {key: value for key, value in state.items() if not key.startswith(tuple(ignored))}
    shapes = {key: value.shape for key, value in given.items()}
    wanted = {key: value.shape for key, value in module.state_dict().items()}
    check_shapes(shapes, wanted, str(path), "use the weights that belong to the configuration")
    module.load_state_dict(given, assign=any(each.is_meta for each in module.parameters()))
    module.eval().requires_grad_(False)


def load_tokenizer(source: Path | str) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer at ``source`` (folder or hub id).

    Offline, transformers may silently return an almost empty tokenizer: check its size with
    :func:`check_vocabulary`.
    """
    pinned = None if Path(source).is_dir() else revision_of(str(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=pinned or "main")
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot load the tokenizer ({reason(error)})") from None
    return cast(PreTrainedTokenizerBase, tokenizer)


def check_vocabulary(source: str, found: int, expected: int) -> None:
    """Raises :class:`UserError` unless the tokenizer has the text tower's size."""
    if found != expected:
        raise UserError(
            f"{source}: the tokenizer has {found} tokens but the text model expects {expected}; "
            "its files are missing or belong to another model"
        )


class PromptTokenizer:
    """A tokenizer that truncates prompts to ``limit`` tokens, special ones included."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, limit: int, padding: bool | str = True
    ) -> None:
        self.tokenizer, self.limit, self.padding = tokenizer, limit, padding
        # Fast tokenizers are not thread-safe: they store the options of the last call.
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
