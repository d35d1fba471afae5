"""Loads checkpoints of a whole transformer over the base model's.

A checkpoint is a diffusers ``transformer/`` folder, a safetensors file, or several with an index,
on disk or on the hub. All names and shapes are checked first; tensors are then read one by one into
the existing parameters: FLUX's are 24 GB in bfloat16.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint.

    Attributes:
        label: for messages: the path, or the hub id with its commit.
        weights: safetensors files that together contain every tensor once.
        config: its ``config.json``, if there is one.
    """

    label: str
    weights: tuple[Path, ...]
    config: Path | None


def local_path(config: CheckpointConfig) -> Path | None:
    """The local folder or file of ``config``; None for a hub id."""
    path = Path(config.source).expanduser()
    if not path.exists():
        return None
    return path.joinpath(*(part for part in (config.subfolder, config.file) if part))


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
                f"{label}: no transformer weights (*.safetensors); set checkpoint.subfolder and "
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
    config = folder / CONFIG_FILE
    return CheckpointFiles(label, tuple(weights), config if config.is_file() else None)


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
    shapes: dict[str, list[int]] = {}
    for path in files.weights:
        for key, shape in _shapes(path, files.label).items():
            if key in shapes:
                raise UserError(
                    f"{files.label}: {key} is in several files; select one with checkpoint.file"
                )
            shapes[key] = shape
    wanted = {name: tensor.shape for name, tensor in parameters.items()}
    check_shapes(shapes, wanted, files.label, _fix(shapes))
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
    if any("lora" in name.lower() for name in names):
        return "it is an adapter: merge it into the base and save the whole transformer"
    return "use a transformer of the base's architecture with diffusers' names"
