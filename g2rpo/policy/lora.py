"""LoRA on the transformer, through peft.

The adapters are saved as a standard diffusers LoRA file, which the pipeline's
``load_lora_weights`` loads with the same scale.
"""

import json
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
from g2rpo.policy.config import LoraConfig
from g2rpo.seeds import gaussian
from g2rpo.weights import check_shapes

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name of a LoRA file in diffusers."""
_METADATA = "lora_adapter_metadata"
_PREFIX = "transformer."
_ADAPTER = "default"


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
    pipeline.save_lora_weights(str(folder), transformer_lora_layers=layers, **metadata)


def load_lora(transformer: nn.Module, folder: Path) -> None:
    """Reads adapters written by :func:`save_lora`; adds them if the transformer has none.

    Raises:
        UserError: the file is missing, damaged or of different adapters; no weight is changed.
    """
    path = folder / LORA_FILE
    tensors, metadata = _read(path)
    if not lora_parameters(transformer):
        add_lora(transformer, _config_of(path, metadata), seed=0)
    saved = {_parameter_name(key): value for key, value in tensors.items()}
    parameters = lora_parameters(transformer)
    given, wanted = ({n: t.shape for n, t in each.items()} for each in (saved, parameters))
    fix = "it was trained with another lora.rank, lora.target_modules or base"
    check_shapes(given, wanted, str(path), fix)
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with safe_open(path, framework="pt") as opened:
            keys = list(opened.keys())
            return {key: opened.get_tensor(key) for key in keys}, opened.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such LoRA file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable LoRA file ({reason(error)})") from None


def _config_of(path: Path, metadata: Mapping[str, str]) -> LoraConfig:
    try:
        stored: dict[str, Any] = json.loads(metadata[_METADATA])
        return LoraConfig(
            rank=stored[f"{_PREFIX}r"],
            alpha=stored[f"{_PREFIX}lora_alpha"],
            target_modules=tuple(sorted(stored[f"{_PREFIX}target_modules"])),
        )
    except (KeyError, ValueError):
        raise UserError(
            f"{path}: no rank and alpha ({_METADATA}); save it with diffusers' LoRA metadata"
        ) from None


def _parameter_name(key: str) -> str:
    """``transformer.<layer>.lora_A.weight`` to the model's ``<layer>.lora_A.<adapter>.weight``."""
    layer, _, last = key.removeprefix(_PREFIX).rpartition(".")
    return f"{layer}.{_ADAPTER}.{last}"


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
