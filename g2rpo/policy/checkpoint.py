"""Weights of a whole transformer that were trained elsewhere: found, checked, laid over the base.

A checkpoint is a diffusers ``transformer/`` folder, one safetensors file, or several with their
index, on disk or on the hub. Tensors are checked by name and shape before the first is read, and
read one by one into the parameters that are there: FLUX's are 24 GB in bfloat16.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from g2rpo.checksums import check_exported
from g2rpo.errors import UserError
from g2rpo.files import read_json
from g2rpo.hub.fetch import fetch_snapshot
from g2rpo.policy.config import CheckpointConfig
from g2rpo.policy.folder import HUB_ID

CONFIG_FILE = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
"""What diffusers calls the weights of a transformer."""
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint.

    Attributes:
        label: names it to people: the path, or the hub id with its commit.
        weights: safetensors files that together hold every tensor once.
        config: its ``config.json``, where it has one.
    """

    label: str
    weights: tuple[Path, ...]
    config: Path | None


def local_path(config: CheckpointConfig) -> Path | None:
    """The folder or file that ``config`` names on this machine; None where it is a hub id."""
    path = Path(config.source).expanduser()
    if not path.exists():
        return None
    return path.joinpath(*(part for part in (config.subfolder, config.file) if part))


def find_checkpoint(config: CheckpointConfig) -> CheckpointFiles:
    """The files of the checkpoint, fetched if it is on the hub.

    Raises:
        UserError: there is no such source, or it does not hold the weights; one line.
    """
    path = local_path(config)
    if path is not None:
        check_exported(path)
        return files_at(path, str(path))
    if not HUB_ID.fullmatch(config.source):
        raise UserError(
            f"checkpoint source {config.source!r}: no such folder or file, nor a hub id of the "
            "form owner/name"
        )
    inside = f"{config.subfolder}/" if config.subfolder else ""
    names = [f"{WEIGHTS_STEM}*.safetensors", f"{WEIGHTS_STEM}{INDEX_SUFFIX}"]
    if config.file is not None:
        stem = config.file.removesuffix(INDEX_SUFFIX)
        names = [config.file] if stem == config.file else [config.file, f"{stem}*.safetensors"]
    patterns = [inside + name for name in (*names, CONFIG_FILE)]
    snapshot = fetch_snapshot(config.source, patterns, config.revision, "checkpoint")
    return files_at(
        snapshot.joinpath(*(part for part in (config.subfolder, config.file) if part)),
        "/".join(
            part
            for part in (f"{config.source}@{snapshot.name}", config.subfolder, config.file)
            if part
        ),
    )


def files_at(path: Path, label: str) -> CheckpointFiles:
    """The checkpoint in the folder, the file or the index ``path``.

    A pipeline folder stands for its ``transformer/``.

    Raises:
        UserError: there is none, or a file of it is missing; names ``label``.
    """
    if (path / "transformer").is_dir():
        path = path / "transformer"
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        weights = sorted(path.glob("*.safetensors"))
        if len(indices) > 1:
            raise UserError(f"{label}: holds {len(indices)} indices; name one with checkpoint.file")
        if indices:
            weights = _shards(indices[0], label)
        if not weights:
            raise UserError(
                f"{label}: no transformer weights (*.safetensors); name their place with "
                "checkpoint.subfolder and checkpoint.file, or fetch them with `g2rpo weights fetch`"
            )
    elif not path.is_file():
        raise UserError(
            f"{label}: no such folder or file of transformer weights; correct checkpoint.source, "
            "checkpoint.subfolder or checkpoint.file"
        )
    elif path.name.endswith(INDEX_SUFFIX):
        weights = _shards(path, label)
    elif path.suffix == ".safetensors":
        weights = [path]
    else:
        raise UserError(
            f"{label}: weights are read from safetensors only; convert {path.suffix} files first"
        )
    config = folder / CONFIG_FILE
    return CheckpointFiles(label, tuple(weights), config if config.is_file() else None)


def _shards(index: Path, label: str) -> list[Path]:
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    files = [index.parent / name for name in names]
    absent = [file.name for file in files if not file.is_file()]
    if not files:
        raise UserError(f"{label}: {index.name} names no files; download it again")
    if absent:
        raise UserError(
            f"{label}: lacks {len(absent)} of the {len(files)} files that {index.name} names, "
            f"first {absent[0]}; download it again"
        )
    return files


def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Copies ``whole`` into ``target``; of a sharded one, each rank copies its own part."""
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
    """Copies every tensor of ``files`` into the one of its name, in that one's dtype and device.

    Nothing is changed unless all names and shapes are right. Where ``rounding`` is given, values
    are rounded to it on the way.

    Raises:
        UserError: a file is damaged, a tensor is missing, unknown, twice there or of another
            shape; one line that names the first.
    """
    shapes: dict[str, list[int]] = {}
    for path in files.weights:
        for key, shape in _shapes(path, files.label).items():
            if key in shapes:
                raise UserError(
                    f"{files.label}: {key} is in several files; name one with checkpoint.file"
                )
            shapes[key] = shape
    _check_shapes(parameters, shapes, files.label)
    for path in files.weights:
        try:
            with torch.no_grad(), safe_open(path, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    copy_whole(parameters[key], opened.get_tensor(key).to(rounding))
        except (OSError, SafetensorError) as error:
            raise UserError(_damaged(path, files.label, error)) from None


def _damaged(path: Path, label: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"{label}: {path.name} cannot be read as safetensors ({reason}); download it again"


def _shapes(path: Path, label: str) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as opened:
            keys: Sequence[str] = opened.keys()
            return {key: list(opened.get_slice(key).get_shape()) for key in keys}
    except (OSError, SafetensorError) as error:
        raise UserError(_damaged(path, label, error)) from None


def _check_shapes(
    parameters: Mapping[str, Tensor], given: Mapping[str, Sequence[int]], label: str
) -> None:
    missing, unknown = _first(parameters, given), _first(given, parameters)
    if missing or unknown:
        count = len(parameters.keys() - given.keys()), len(given.keys() - parameters.keys())
        what = f"it lacks {missing}" if missing else f"it has an unknown {unknown}"
        mend = "give the transformer of the base's own architecture, under diffusers' names"
        if any("double_blocks." in key for key in given):
            mend = "these are the names of the original FLUX code: convert it to diffusers' first"
        elif any("lora" in key.lower() for key in given):
            mend = "this is an adapter: merge it into the base and save the whole transformer"
        raise UserError(
            f"{label}: not the weights of this transformer: {what} "
            f"({count[0]} tensors missing, {count[1]} unknown); {mend}"
        )
    for key, shape in given.items():
        expected = list(parameters[key].shape)
        if list(shape) != expected:
            raise UserError(
                f"{label}: {key} has shape {list(shape)} where the base has {expected}; "
                "it was trained from another base"
            )


def _first(names: Iterable[str], known: Mapping[str, object]) -> str | None:
    return min((name for name in names if name not in known), default=None)
