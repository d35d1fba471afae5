"""LoRA on the transformer, through peft.

The adapters are saved as a standard diffusers LoRA file, which the pipeline's
``load_lora_weights`` loads with the same scale.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from g2rpo.errors import UserError, reason
from g2rpo.files import read_json
from g2rpo.policy.checkpoint import (
    ADAPTER_CONFIG,
    LORA_PREFIXES,
    CheckpointFiles,
    lora_layer,
)
from g2rpo.policy.config import LoraConfig
from g2rpo.seeds import gaussian
from g2rpo.weights import check_shapes

logger = logging.getLogger(__name__)
_METADATA = "lora_adapter_metadata"
_PREFIX = "transformer."
_ADAPTER = "default"
_SCALE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""Of PEFT's configuration: what the output of adapters depends on."""


def add_lora(transformer: Any, config: LoraConfig, seed: int) -> None:
    """Freezes the transformer and adds adapters whose output is zero.

    Each A is Gaussian with std 1 / rank, drawn on the CPU from ``seed`` and the layer's name; each
    B is zero. The adapters are float32, or float64 in a float64 transformer.

    Raises:
        UserError: ``target_modules`` matches no layer of this transformer.
    """
    transformer.requires_grad_(False)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        init_lora_weights="gaussian",
        target_modules=list(config.target_modules),
    )
    try:
        transformer.add_adapter(settings, adapter_name=_ADAPTER)
    except ValueError as error:
        raise UserError(f"lora.target_modules: {reason(error)}") from None
    for name, parameter in lora_parameters(transformer).items():
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        values = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            values = gaussian(parameter.shape, seed, "lora", name) / config.rank
        parameter.data = values.to(parameter.device, dtype)
        parameter.requires_grad_(True)


def lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters by name; empty if there are none."""
    return {name: p for name, p in transformer.named_parameters() if ".lora_" in name}


def save_lora(transformer: nn.Module, folder: Path, pipeline: Any) -> None:
    """Writes the adapters with their rank and alpha to ``folder``, as ``pipeline``'s class does."""
    layers = {
        name: value.contiguous() for name, value in get_peft_model_state_dict(transformer).items()
    }
    metadata = _collate_lora_metadata({"transformer": transformer})
    for settings in metadata.values():  # sets, whose order changes from process to process
        settings |= {k: sorted(v) for k, v in settings.items() if isinstance(v, (set, list))}
    pipeline.save_lora_weights(str(folder), transformer_lora_layers=layers, **metadata)


def load_lora(transformer: nn.Module, files: CheckpointFiles) -> None:
    """Reads the adapters of a LoRA in diffusers' or PEFT's format; adds them if there are none.

    Added ones are frozen with the transformer and stay apart from its weights: merging them into
    bfloat16 would round small updates away.

    Raises:
        UserError: the file is missing, damaged or of different adapters; no weight is changed.
    """
    tensors, metadata = _read(files)
    if not lora_parameters(transformer):
        _add_adapters(transformer, files, tensors, metadata)
    saved = {_parameter_name(key): value for key, value in tensors.items()}
    parameters = lora_parameters(transformer)
    given, wanted = ({n: t.shape for n, t in each.items()} for each in (saved, parameters))
    fix = "it was trained with another lora.rank, lora.target_modules or base"
    check_shapes(given, wanted, files.label, fix)
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)


def _read(files: CheckpointFiles) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of all files, and the metadata of the last."""
    tensors: dict[str, Tensor] = {}
    metadata: Mapping[str, str] = {}
    for path in files.weights:
        try:
            with safe_open(path, framework="pt") as opened:
                tensors |= {key: opened.get_tensor(key) for key in list(opened.keys())}
                metadata = opened.metadata() or {}
        except FileNotFoundError:
            raise UserError(f"{path}: no such LoRA file") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable LoRA file ({reason(error)})") from None
    return tensors, metadata


def _add_adapters(
    transformer: Any,
    files: CheckpointFiles,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Adds adapters to exactly the layers of ``tensors``, with the scale that the file states."""
    firsts = {key: value for key, value in tensors.items() if key.endswith(".lora_A.weight")}
    ranks = {f"^{re.escape(lora_layer(key)[0])}": len(value) for key, value in firsts.items()}
    stated = _stated(files, metadata)
    if stated is None:
        if any(key.startswith(LORA_PREFIXES[0]) for key in tensors):
            raise UserError(
                f"{files.label}: no {ADAPTER_CONFIG} beside it, with its alpha; copy it there"
            )
        logger.warning("%s: no alpha; it is taken for the rank, as in diffusers", files.label)
        stated = {"r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": ranks}
    if not any(value.any() for key, value in tensors.items() if ".lora_B." in key):
        logger.warning("%s: changes nothing: its B matrices are all zero", files.label)
    transformer.requires_grad_(False)
    try:
        settings = peft.LoraConfig(
            **stated,
            lora_dropout=0.0,
            # A text is one pattern for whole names; a list would be their ends.
            target_modules="|".join(layer.removeprefix("^") for layer in ranks),
        )
        transformer.add_adapter(settings, adapter_name=_ADAPTER)
    except (ValueError, TypeError) as error:
        raise UserError(f"{files.label}: not a LoRA for this base ({reason(error)})") from None
    for parameter in lora_parameters(transformer).values():
        parameter.data = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(False)


def _stated(files: CheckpointFiles, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The rank and scale in PEFT's configuration or in diffusers' metadata; None without either."""
    try:
        if files.adapter is not None:
            stored = read_json(files.adapter)
        elif _METADATA in metadata:
            stored = json.loads(metadata[_METADATA])
        else:
            return None
        stored = {key.removeprefix(_PREFIX): value for key, value in stored.items()}
        return {key: stored[key] for key in _SCALE if stored.get(key) is not None}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{files.label}: its configuration cannot be read ({error})") from None


def _parameter_name(key: str) -> str:
    """``transformer.<layer>.lora_A.weight`` to the model's ``<layer>.lora_A.<adapter>.weight``."""
    layer, kind = lora_layer(key)
    first, _, last = kind.partition(".")
    return f"{layer}.{first}.{_ADAPTER}.{last}"


@contextmanager
def lora_disabled(transformer: nn.Module) -> Iterator[None]:
    """Within the block the transformer is its frozen base."""
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
