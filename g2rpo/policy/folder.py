"""Finds and checks a policy's diffusers pipeline folder, on disk or from the hub.

A hub id is first resolved to the folder of its cached snapshot. Missing files are reported before
any weights are read.
"""

import functools
import hashlib
import re
from collections.abc import Iterable
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
from g2rpo.policy.architectures import ARCHITECTURES, pipeline_name, text_endings
from g2rpo.progress import without_library_bars

ENDINGS = tuple(dict.fromkeys(end for known in ARCHITECTURES.values() for end in known.tokenizers))
"""Of the text encoders and tokenizers of any architecture."""
REMEMBERED = 10**9
"""Hashes of files of at least this many bytes are remembered between processes."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_source(source: str, revision: str | None) -> Path:
    """The complete pipeline folder of ``source``, a folder or a hub id at ``revision``.

    Raises:
        UserError: no such folder; the hub id is gated, unknown, or not cached while offline; the
            folder is not a complete pipeline folder, or a damaged export.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if not HUB_ID.fullmatch(source):
            raise UserError(
                f"policy source {source!r}: no such folder, and not a hub id (owner/name)"
            )
        # Only these folders: the repositories also have the same weights in other formats.
        parts = ("transformer", "vae", *_text_folders(ENDINGS), "scheduler")
        patterns = ["model_index.json", *(f"{name}/*" for name in parts)]
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
    # Without an index the folder is incomplete; a null encoder does not count, whatever is there.
    known = (folder / "model_index.json").is_file()
    for name in _text_folders(text_endings(folder) if known else ENDINGS):
        for path in sorted((folder / name).rglob("*")):
            if path.is_file():
                large = path.stat().st_size >= REMEMBERED
                sha256 = digests.of(path) if large else sha256_file(path)
                listing.update(f"{path.relative_to(folder).as_posix()} {sha256}\n".encode())
    return listing.hexdigest()


def _text_folders(endings: Iterable[str]) -> tuple[str, ...]:
    endings = tuple(endings)
    kinds = ("text_encoder", "tokenizer")
    return tuple(f"{kind}{ending}" for kind in kinds for ending in endings)


def components(folder: Path) -> tuple[str, ...]:
    """The subfolders of the pipeline in ``folder`` that a policy is made of.

    Raises:
        UserError: see :func:`pipeline_name`.
    """
    return ("transformer", "vae", *_text_folders(text_endings(folder)), "scheduler")


def check_pipeline_folder(folder: Path) -> None:
    """Checks that ``folder`` is a whole diffusers pipeline folder with safetensors weights.

    Raises:
        UserError: names all missing files.
    """
    name = pipeline_name(folder)
    endings = text_endings(folder)
    models = ("transformer", "vae", *(f"text_encoder{ending}" for ending in endings))
    missing = [file for part in models for file in _missing_of_model(folder, part)]
    for ending in endings:
        part, choices = f"tokenizer{ending}", ARCHITECTURES[name].tokenizers[ending]
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
    """Loads one component from its own folder, with its weights complete, in evaluation mode.

    ``options`` are further arguments of ``from_pretrained``, the dtype among them.

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
