"""Finds and checks a policy's diffusers FluxPipeline folder, on disk or from the hub.

A hub id is first resolved to the folder of its cached snapshot. Missing files are reported before
any weights are read.
"""

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError

from g2rpo.checksums import check_exported
from g2rpo.errors import UserError, reason
from g2rpo.files import read_json, sha256_file
from g2rpo.hub.cache import Digests
from g2rpo.hub.catalogue import COMMIT
from g2rpo.hub.fetch import fetch_snapshot
from g2rpo.hub.lock import revision_of
from g2rpo.policy.architectures import pipeline_name
from g2rpo.progress import without_library_bars

MODEL_FOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2")
TOKENIZER_FILES = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
}
COMPONENTS = (*MODEL_FOLDERS, *TOKENIZER_FILES, "scheduler")
TEXT_FOLDERS = ("text_encoder", "text_encoder_2", *TOKENIZER_FILES)
"""Everything that affects text embeddings."""
REMEMBERED = 10**9
"""Hashes of files of at least this many bytes are remembered between processes."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_source(source: str, revision: str | None) -> Path:
    """The complete FluxPipeline folder of ``source``.

    Args:
        source: a folder, or a hub id such as ``black-forest-labs/FLUX.1-dev``.
        revision: the hub revision (branch, tag or commit); ignored for a folder.

    Raises:
        UserError: no such folder; the hub id is gated, unknown, or not cached while offline; the
            folder is not a complete FluxPipeline folder, or a damaged export.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if not HUB_ID.fullmatch(source):
            raise UserError(
                f"policy source {source!r}: no such folder, and not a hub id (owner/name)"
            )
        # Only these folders: FLUX repositories also have the same weights in other formats.
        patterns = ["model_index.json", *(f"{name}/*" for name in COMPONENTS)]
        folder = fetch_snapshot(source, patterns, revision, "policy")
    check_pipeline_folder(folder)
    check_exported(folder)
    return folder


def folder_here(source: str, revision: str | None) -> Path | None:
    """The folder of ``source`` if it is already on this machine; does not use the network."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(source):
        return None
    found = try_to_load_from_cache(
        source, "model_index.json", revision=revision or revision_of(source)
    )
    return Path(found).parent if isinstance(found, str) else None


def text_fingerprint(source: str, revision: str | None) -> str | dict[str, str] | None:
    """Identifies the text encoders and tokenizers of ``source``; does not use the network.

    Returns:
        A hash of their files for a folder, the id and commit for a hub repository; None if the
        commit is unknown because nothing is cached.
    """
    folder = folder_here(source, revision)
    commit = revision or revision_of(source)
    if folder is not None:
        if Path(source).expanduser().is_dir() or not re.match(COMMIT, folder.name):
            return _text_hash(folder.resolve())
        commit = folder.name
    if commit is None or not re.match(COMMIT, commit):
        return None
    return {"id": source, "revision": commit}


@functools.cache
def _text_hash(folder: Path) -> str:
    digests, listing = Digests(), hashlib.sha256()
    for name in TEXT_FOLDERS:
        for path in sorted((folder / name).rglob("*")):
            if path.is_file():
                large = path.stat().st_size >= REMEMBERED
                sha256 = digests.of(path) if large else sha256_file(path)
                listing.update(f"{path.relative_to(folder).as_posix()} {sha256}\n".encode())
    return listing.hexdigest()


def check_pipeline_folder(folder: Path) -> None:
    """Checks that ``folder`` is a whole diffusers FluxPipeline folder with safetensors weights.

    Raises:
        UserError: names all missing files.
    """
    name = pipeline_name(folder)
    missing = [file for part in MODEL_FOLDERS for file in _missing_of_model(folder, part)]
    for part, choices in TOKENIZER_FILES.items():
        # transformers silently creates an empty tokenizer from an empty folder.
        if not any(all((folder / part / file).is_file() for file in files) for files in choices):
            missing.append(" or ".join(f"{part}/{'+'.join(files)}" for files in choices))
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        missing.append("scheduler/scheduler_config.json")
    if missing:
        raise UserError(
            f"{folder}: missing from the {name} folder: {', '.join(missing)}; copy or "
            "download it again"
        )


def _missing_of_model(folder: Path, name: str) -> list[str]:
    part = folder / name
    if not part.is_dir():
        return [f"{name}/"]
    missing = [] if (part / "config.json").is_file() else [f"{name}/config.json"]
    indices = sorted(part.glob("*.safetensors.index.json"))
    if not indices and not any(part.glob("*.safetensors")):
        missing.append(f"{name}/*.safetensors")
    for index in indices:
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing += [f"{name}/{shard}" for shard in shards if not (part / shard).is_file()]
    return missing


def load_model(model_class: Any, folder: Path, **options: Any) -> Any:
    """Loads one component with its weights complete, in evaluation mode.

    Args:
        model_class: a diffusers or transformers model class.
        folder: the component's own folder (config.json and safetensors).
        options: further arguments of ``from_pretrained``, the dtype among them.

    Raises:
        UserError: a file cannot be read, or tensors are missing (the libraries would initialise
            them at random and only warn).
    """
    try:
        with without_library_bars():
            model, report = model_class.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot load {model_class.__name__} ({reason(error)}); copy or download the "
            "folder again"
        ) from None
    absent = sorted(report["missing_keys"])
    if absent:
        raise UserError(
            f"{folder}: {len(absent)} tensors of {model_class.__name__} are missing, first "
            f"{absent[0]}; copy or download the folder again"
        )
    return model.eval()


def checked_device(device: torch.device | str) -> torch.device:
    """``device`` as a :class:`torch.device`; raises :class:`UserError` if it is not available."""
    try:
        checked = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r}: unknown device type; use cpu or cuda") from None
    if checked.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or count == 0:
            raise UserError(
                f"device {str(checked)!r}: no usable CUDA GPU; use device=cpu, or check the driver "
                "with nvidia-smi"
            )
        if checked.index is not None and checked.index >= count:
            raise UserError(f"device {str(checked)!r}: only {count} CUDA GPU(s), numbered from 0")
    return checked
