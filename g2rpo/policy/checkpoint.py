"""Finds checkpoints of a transformer, checks that they fit a base, and loads whole ones over it.

A checkpoint is a diffusers ``transformer/`` folder, a safetensors file, or several with an index,
or a LoRA in diffusers' or PEFT's format, on disk or on the hub. All names and shapes are checked
first; tensors are then read one by one into the existing parameters: FLUX's are 24 GB in bfloat16.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from g2rpo.checksums import check_exported
from g2rpo.errors import UserError, reason
from g2rpo.files import read_json
from g2rpo.hub.fetch import fetch_snapshot
from g2rpo.policy.config import CheckpointConfig
from g2rpo.policy.folder import HUB_ID
from g2rpo.weights import check_shapes

CONFIG_FILE = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
"""The name of transformer weights in diffusers."""
INDEX_SUFFIX = ".safetensors.index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name of a LoRA file in diffusers."""
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The names of a LoRA's files in PEFT."""
LORA_PREFIXES = ("base_model.model.", "transformer.")
"""What PEFT and diffusers put before the name of a layer."""


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint.

    Attributes:
        label: for messages: the path, or the hub id with its commit.
        weights: safetensors files that together contain every tensor once.
        config: its ``config.json``, if there is one.
        adapter: the ``adapter_config.json`` of a LoRA in PEFT's format.
    """

    label: str
    weights: tuple[Path, ...]
    config: Path | None
    adapter: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that determine what the policy computes."""
        return self.weights if self.adapter is None else (*self.weights, self.adapter)

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of every tensor by name.

        Raises:
            UserError: a file is damaged, or two have a tensor of one name.
        """
        shapes: dict[str, list[int]] = {}
        for path in self.weights:
            for key, shape in _shapes(path, self.label).items():
                if key in shapes:
                    raise UserError(
                        f"{self.label}: {key} is in several files; select one with checkpoint.file"
                    )
                shapes[key] = shape
        return shapes

    @property
    def is_lora(self) -> bool:
        """Whether it holds adapters instead of a whole transformer."""
        return any(".lora_" in key for key in self.shapes)


def local_path(config: CheckpointConfig) -> Path | None:
    """The local folder or file of ``config``; None for a hub id."""
    path = Path(config.source).expanduser()
    return path.joinpath(*_inside(config)) if path.exists() else None


def _inside(config: CheckpointConfig) -> list[str]:
    """The subfolder and the file in the source, where they are set."""
    return [part for part in (config.subfolder, config.file) if part]


def find_checkpoint(config: CheckpointConfig) -> CheckpointFiles:
    """The files of the checkpoint, downloaded if it is on the hub.

    Raises:
        UserError: there is no such source, or it has no such weights.
    """
    path = local_path(config)
    if path is not None:
        check_exported(path)
        return files_at(path, str(path))
    if not HUB_ID.fullmatch(config.source):
        raise UserError(
            f"checkpoint source {config.source!r}: no such folder or file, and not a hub id "
            "(owner/name)"
        )
    inside = f"{config.subfolder}/" if config.subfolder else ""
    names = [f"{WEIGHTS_STEM}*.safetensors", f"{WEIGHTS_STEM}{INDEX_SUFFIX}"]
    names += [LORA_FILE, ADAPTER_FILE]
    if config.file is not None:
        stem = config.file.removesuffix(INDEX_SUFFIX)
        names = [config.file] if stem == config.file else [config.file, f"{stem}*.safetensors"]
    patterns = [inside + name for name in (*names, CONFIG_FILE, ADAPTER_CONFIG)]
    snapshot = fetch_snapshot(config.source, patterns, config.revision, "checkpoint")
    parts = _inside(config)
    label = "/".join([f"{config.source}@{snapshot.name}", *parts])
    return files_at(snapshot.joinpath(*parts), label)


def files_at(path: Path, label: str) -> CheckpointFiles:
    """The checkpoint at ``path``: a folder, file or index.

    For a pipeline folder, this is its ``transformer/``.

    Raises:
        UserError: there is none, or one of its files is missing; names ``label``.
    """
    if (path / "transformer").is_dir():
        path = path / "transformer"
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        weights = sorted(path.glob("*.safetensors"))
        if len(indices) > 1:
            raise UserError(f"{label}: {len(indices)} index files; select one with checkpoint.file")
        if indices:
            weights = _shards(indices[0], label)
        if not weights:
            raise UserError(
                f"{label}: no weights (*.safetensors); set checkpoint.subfolder and "
                "checkpoint.file, or fetch them with `g2rpo weights fetch`"
            )
    elif not path.is_file():
        raise UserError(
            f"{label}: no such folder or file; correct checkpoint.source, checkpoint.subfolder or "
            "checkpoint.file"
        )
    elif path.name.endswith(INDEX_SUFFIX):
        weights = _shards(path, label)
    elif path.suffix == ".safetensors":
        weights = [path]
    else:
        raise UserError(
            f"{label}: only safetensors files are supported; convert the {path.suffix} file"
        )
    config, adapter = (
        path if path.is_file() else None for path in (folder / CONFIG_FILE, folder / ADAPTER_CONFIG)
    )
    return CheckpointFiles(label, tuple(weights), config, adapter)


def _shards(index: Path, label: str) -> list[Path]:
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    files = [index.parent / name for name in names]
    absent = [file.name for file in files if not file.is_file()]
    if not files:
        raise UserError(f"{label}: {index.name} lists no files; download it again")
    if absent:
        raise UserError(
            f"{label}: {len(absent)} of the {len(files)} files in {index.name} are missing, first "
            f"{absent[0]}; download it again"
        )
    return files


def check_fits(
    files: CheckpointFiles, transformer: nn.Module, config: Mapping[str, Any], base: Path
) -> None:
    """Checks that the weights of a checkpoint are of a base's architecture; reads only shapes.

    ``transformer``, possibly on the meta device, and ``config`` are those of the pipeline ``base``.

    Raises:
        UserError: a configuration value differs, or a tensor is missing, unknown, or of another
            shape; names the first.
    """
    if files.is_lora:
        fix = (
            f"use a LoRA for {base} whose layers are named as in diffusers or PEFT, e.g. "
            "transformer_blocks.0.attn.to_q.lora_A.weight"
        )
        check_shapes(files.shapes, _lora_shapes(files.shapes, transformer), files.label, fix)
        return
    saved = {} if files.config is None else read_json(files.config)
    for key, value in config.items():
        if not key.startswith("_") and saved.get(key, _plain(value)) != _plain(value):
            raise UserError(
                f"{files.label}: the transformer has {key}={saved[key]}, but the base in "
                f"{base} has {key}={_plain(value)}; load it over its own base"
            )
    _check_whole(files, transformer.state_dict())


def lora_layer(key: str) -> tuple[str, str]:
    """The layer that a tensor of a LoRA belongs to, and what it is, such as ``lora_A.weight``."""
    for prefix in LORA_PREFIXES:
        key = key.removeprefix(prefix)
    layer, separator, rest = key.partition(".lora_")
    return layer, f"lora_{rest}" if separator else ""


def _lora_shapes(
    shapes: Mapping[str, Sequence[int]], transformer: nn.Module
) -> dict[str, tuple[int, int]]:
    """The shapes that adapters must have on those layers of ``shapes`` that exist."""
    linear = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    wanted = {}
    for key, shape in shapes.items():
        layer, kind = lora_layer(key)
        module = linear.get(layer)
        if module is not None and kind in ("lora_A.weight", "lora_B.weight"):
            first, second = f"{key[: -len(kind)]}lora_A.weight", f"{key[: -len(kind)]}lora_B.weight"
            rank = (*shapes.get(first, shape), 0)[0]
            wanted[first] = rank, module.in_features
            wanted[second] = module.out_features, rank
    return wanted


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_whole(files: CheckpointFiles, parameters: Mapping[str, Tensor]) -> None:
    wanted = {name: tensor.shape for name, tensor in parameters.items()}
    check_shapes(files.shapes, wanted, files.label, _fix(files.shapes))


def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Copies ``whole`` into ``target``; if that is sharded, each rank copies its own part."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor):
        part = distribute_tensor(
            whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(whole)


def read_into(
    parameters: Mapping[str, Tensor], files: CheckpointFiles, rounding: torch.dtype | None = None
) -> None:
    """Copies every tensor of ``files`` into the parameter of that name, in place.

    Changes nothing unless all names and shapes match. Values are first rounded to ``rounding``, if
    given.

    Raises:
        UserError: a file is damaged, or a tensor is missing, unknown, duplicated or of another
            shape; names the first.
    """
    _check_whole(files, parameters)
    for path in files.weights:
        try:
            with torch.no_grad(), safe_open(path, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a mapping
                    copy_whole(parameters[key], opened.get_tensor(key).to(rounding))
        except (OSError, SafetensorError) as error:
            raise UserError(_damaged(path, files.label, error)) from None


def _damaged(path: Path, label: str, error: Exception) -> str:
    return (
        f"{label}: {path.name} is not a readable safetensors file ({reason(error)}); download it "
        "again"
    )


def _shapes(path: Path, label: str) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as opened:
            keys: Sequence[str] = opened.keys()
            return {key: list(opened.get_slice(key).get_shape()) for key in keys}
    except (OSError, SafetensorError) as error:
        raise UserError(_damaged(path, label, error)) from None


def _fix(names: Iterable[str]) -> str:
    """What to do about a checkpoint whose tensors have these ``names``, if they do not fit."""
    if any("double_blocks." in name for name in names):
        return "it has the names of the original FLUX code: convert it to diffusers"
    return "use a transformer of the base's architecture with diffusers' names"
