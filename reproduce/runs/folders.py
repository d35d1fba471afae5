"""Run folders on disk, and finding them by name.

Nothing here imports a model library: runs are listed on login nodes.
"""

import difflib
import fnmatch
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from g2rpo.checksums import FILES, checksums_of, parse_document, problems, write_document
from g2rpo.errors import UserError, reason
from g2rpo.training.checkpoint.folder import CHECKPOINTS, checkpoint_folder, problem

logger = logging.getLogger(__name__)

AGAIN = "rerun the command that wrote it"
IMAGES = "image_files"
"""Section of a manifest with the checksums of images."""
SETTINGS = "config.json"
EVALUATIONS = "evaluations"
MANIFEST = "manifest.json"
SHOWN_NAMES = 4
"""Number of names shown for an ambiguous prefix."""


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a training run, or an evaluated base or checkpoint."""
    return any((folder / name).exists() for name in (SETTINGS, CHECKPOINTS, EVALUATIONS))


def run_folders(runs_folder: Path) -> list[Path]:
    """The runs in a folder, sorted by name."""
    if not runs_folder.is_dir():
        return []
    return sorted(folder for folder in runs_folder.iterdir() if is_run(folder))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage; None if there is none.

    Raises:
        UserError: the manifest or a file of the stage, other than weights and images, is damaged.
    """
    return read_document(folder / MANIFEST, ("provenance",))


def read_trained(run: Path) -> dict[str, Any] | None:
    """The manifest of a finished training run, its last checkpoint checked; None if there is none.

    Raises:
        UserError: the manifest, the checkpoint or another file is missing or damaged.
    """
    manifest = read_manifest(run)
    if manifest is None:
        return None
    with reporting_damage(run / MANIFEST):
        checkpoint = checkpoint_folder(run, manifest["progress"]["iteration"])
    damage = problem(checkpoint)
    if damage is not None:
        raise UserError(f"{checkpoint}/{damage}; {AGAIN}")
    return manifest


def read_scored(evaluation: Path) -> dict[str, Any] | None:
    """The manifest of a scored evaluation, its kept images checked; None if there is none.

    Raises:
        UserError: the manifest, a kept image or another file is missing or damaged.
    """
    manifest = read_manifest(evaluation)
    if manifest is not None:
        _check_files(evaluation, manifest.get(IMAGES, {}))
    return manifest


def sound(read: Callable[[Path], dict[str, Any] | None], path: Path) -> dict[str, Any] | None:
    """What ``read`` returns for ``path``; None, with a warning, if that is damaged.

    For deciding what is left to do: a damaged stage runs again, which repairs it.
    """
    try:
        return read(path)
    except UserError as error:
        warn_once(str(error))
        return None


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning once per process."""
    logger.warning("%s", message)


def write_manifest(
    folder: Path,
    manifest: Mapping[str, Any],
    files: Iterable[Path] = (),
    images: Iterable[Path] = (),
) -> None:
    """Marks a stage complete: writes its manifest, with the checksums of its files."""
    listed = {FILES: checksums_of(files, folder), IMAGES: checksums_of(images, folder)}
    write_document(folder / MANIFEST, {**manifest, **listed})


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The training configuration of a run; None if nothing was trained.

    Raises:
        UserError: the file is damaged, or missing although the run has checkpoints.
    """
    path = folder / SETTINGS
    settings = read_document(path, ("method", "rewards", "optimization"))
    if settings is None:
        if (folder / CHECKPOINTS).exists():
            raise UserError(f"{path} is missing; {AGAIN}")
        return None
    with reporting_damage(path):
        if type(settings.get("seed")) is not int:
            raise ValueError("seed is not an integer")
        if not isinstance(settings["method"].get("name"), str):
            raise ValueError("method has no name")
    return settings


def read_document(path: Path, sections: Iterable[str]) -> dict[str, Any] | None:
    """A JSON object with at least these ``sections``; None if there is no such file.

    Raises:
        UserError: the file is damaged, or a file it lists is missing or damaged.
    """
    with reporting_damage(path):
        try:
            document = parse_document(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        for section in sections:
            if not isinstance(document.get(section), dict):
                raise ValueError(f"no section {section!r}")
    _check_files(path.parent, document.get(FILES, {}))
    return document


def listed(path: Path, section: str) -> dict[str, Any]:
    """A section of a document, such as its checksums; empty if the document is damaged."""
    try:
        recorded: dict[str, Any] = parse_document(path.read_bytes()).get(section) or {}
    except (OSError, ValueError):
        return {}
    return recorded


def _check_files(folder: Path, recorded: Mapping[str, Any]) -> None:
    for path, damage in problems(folder, recorded):
        raise UserError(f"{path} {damage}; {AGAIN}")


@contextmanager
def reporting_damage(path: Path) -> Iterator[None]:
    """Turns errors from reading a damaged file into a :class:`UserError`."""
    try:
        yield
    except (KeyError, ValueError, TypeError, OSError) as error:
        # A stage does not run again while its manifest marks it complete.
        files = "it" if path.name == MANIFEST else f"it and the {MANIFEST} next to it"
        raise UserError(
            f"{path}: cannot be read by this version ({reason(error)}); delete {files} and {AGAIN}"
        ) from None


def name_of(given: Path, results: Path) -> str:
    """The name of a run, or its prefix; the path ``results/runs/NAME`` gives NAME.

    Raises:
        UserError: the path is not a run.
    """
    if given.is_dir() and given.parent != Path():
        raise UserError(f"{given}: not a run folder; it has no {SETTINGS} and no {EVALUATIONS}/")
    if given.parent != Path() and given.parent.resolve() != (results / "runs").resolve():
        raise UserError(f"{given}: no such run; list them with `g2rpo runs`")
    return given.name


def chosen_names(part: str, names: Iterable[str]) -> list[str]:
    """The name that ``part`` equals or uniquely begins, or all names that match a pattern.

    Raises:
        UserError: no match, or an ambiguous prefix; names the closest match.
    """
    known = sorted(set(names))
    if part in known:
        return [part]
    matching = fnmatch.filter(known, part)
    if matching:
        return matching
    # Whole words first: seed1 is not a prefix of seed101 if there is a seed1.
    fitting = [name for name in known if part and name.startswith(f"{part}-")]
    fitting = fitting or [name for name in known if part and name.startswith(part)]
    if len(fitting) == 1:
        return fitting
    if fitting:
        more = len(fitting) - SHOWN_NAMES
        listed = ", ".join(fitting[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
        raise UserError(f"{part!r} matches several runs: {listed}; use a longer prefix")
    if not known:
        raise UserError(f"no run {part!r}: no runs yet; use --results for another folder")
    # Compare with prefixes of the same length: a long name is never close to a short part.
    starts = {name[: len(part)]: name for name in reversed(known)}
    close = difflib.get_close_matches(part, starts, n=1, cutoff=0.5)
    hint = f"did you mean {starts[close[0]]!r}?" if close else "list them with `g2rpo runs`"
    raise UserError(f"no run {part!r}; {hint}")
