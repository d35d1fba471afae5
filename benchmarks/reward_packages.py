"""The packages hpsv2 and ImageReward, made to run beside today's libraries without a network."""

import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


@contextmanager
def replaced_modules(replaced: Mapping[str, Any]) -> Iterator[None]:
    """Other modules under these names; unlike under ``patch.dict``, what is imported stays."""
    before = {name: sys.modules.get(name) for name in replaced}
    sys.modules.update(replaced)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextmanager
def hpsv2_open_clip() -> Iterator[Any]:
    """hpsv2's own copy of open_clip, ``hpsv2.src.open_clip``.

    hpsv2 1.2.0 lacks a file of its tokenizer and imports tkinter's turtle.
    """
    # Its tokenizer is open_clip's, but its word list is not in the wheel.
    faults = {
        "hpsv2.src.open_clip.tokenizer": open_clip.tokenizer,
        "turtle": types.SimpleNamespace(forward=None),
    }
    with replaced_modules(faults):
        import hpsv2.src.open_clip as vendored

        yield vendored


def _inverted_mask(self: Any, mask: Tensor) -> Tensor:
    wide = mask[:, None, :, :] if mask.ndim == 3 else mask[:, None, None, :]
    return (1.0 - wide.to(self.dtype)) * torch.finfo(self.dtype).min


def _no_head_mask(self: Any, mask: Any, layers: int, *rest: Any) -> list[None]:
    del self, mask, rest
    return [None] * layers


@contextmanager
def image_reward_package(
    tokenizer: PreTrainedTokenizerBase, vision: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """The package ``ImageReward`` on transformers 5; no weights are fetched.

    image-reward 1.5 imports and calls what transformers 5 dropped.

    Args:
        tokenizer: in place of BERT's with BLIP's two tokens, which it would fetch.
        vision: sizes of the vision tower (as in ``vision_config.json``) in place of BLIP-large's.
    """
    import transformers.modeling_utils
    import transformers.pytorch_utils

    with replaced_modules({"clip": types.ModuleType("clip")}), ExitStack() as stack:

        def change(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(owner, name, value, create=True))

        for name in (
            "apply_chunking_to_forward",
            "find_pruneable_heads_and_indices",
            "prune_linear_layer",
        ):
            gone = getattr(transformers.pytorch_utils, name, None)
            change(transformers.modeling_utils, name, gone)
        import ImageReward
        from ImageReward.models.BLIP import blip_pretrain, med
        from ImageReward.models.BLIP.vit import VisionTransformer

        change(med.BertModel, "invert_attention_mask", _inverted_mask)
        change(med.BertModel, "get_head_mask", _no_head_mask)
        change(med.BertPreTrainedModel, "all_tied_weights_keys", {})
        change(blip_pretrain, "init_tokenizer", lambda: tokenizer)
        if vision is not None:

            def create_vit(size: str, image_size: int, *rest: Any) -> tuple[nn.Module, int]:
                del size, rest
                width = int(vision["hidden_size"])
                tower = VisionTransformer(
                    image_size,
                    vision["patch_size"],
                    embed_dim=width,
                    depth=vision["num_hidden_layers"],
                    num_heads=vision["num_attention_heads"],
                )
                return tower, width

            change(blip_pretrain, "create_vit", create_vit)
        yield ImageReward
