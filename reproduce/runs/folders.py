"""Run folders as they are found on disk, and the names that people call them by.

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
from g2rpo.errors import UserError
from g2rpo.training.checkpoint.folder import CHECKPOINTS, checkpoint_folder, problem

logger = logging.getLogger(__name__)

AGAIN = "run the command that wrote it again"
IMAGES = "image_files"
"""The section of a manifest with the checksums of images."""
SETTINGS = "config.json"
EVALUATIONS = "evaluations"
MANIFEST = "manifest.json"
SHOWN_NAMES = 4
"""Names that are told where a prefix fits several."""


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a training run, or a base or checkpoint that was evaluated."""
    return any((folder / name).exists() for name in (SETTINGS, CHECKPOINTS, EVALUATIONS))


def run_folders(runs_folder: Path) -> list[Path]:
    """The runs in a folder, by name."""
    if not runs_folder.is_dir():
        return []
    return sorted(folder for folder in runs_folder.iterdir() if is_run(folder))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a stage that has ended; None where there is none.

    Raises:
        UserError: it is damaged, or a file of the stage other than weights and images is.
    """
    return read_document(folder / MANIFEST, ("provenance",))


def read_trained(run: Path) -> dict[str, Any] | None:
    """The manifest of a finished training whose last checkpoint is there; None where it has none.

    Raises:
        UserError: it, the checkpoint or another file is missing or damaged.
    """
    manifest = read_manifest(run)
    if manifest is None:
        return None
    with damage_told(run / MANIFEST):
        checkpoint = checkpoint_folder(run, manifest["progress"]["iteration"])
    found = problem(checkpoint)
    if found is not None:
        raise UserError(f"{checkpoint}/{found}; {AGAIN}")
    return manifest


def read_scored(evaluation: Path) -> dict[str, Any] | None:
    """The manifest of a scored evaluation whose images are there; None where it has none.

    Raises:
        UserError: it, an image that is kept or another file is missing or damaged.
    """
    manifest = read_manifest(evaluation)
    if manifest is not None:
        _check_files(evaluation, manifest.get(IMAGES, {}))
    return manifest


def sound(read: Callable[[Path], dict[str, Any] | None], path: Path) -> dict[str, Any] | None:
    """What ``read`` finds at ``path``; None as well, with a warning, where that is damaged.

    For those who decide what is left to do: such a stage runs again, which repairs it.
    """
    try:
        return read(path)
    except UserError as error:
        warn_once(str(error))
        return None


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, once however often it is found."""
    logger.warning("%s", message)


def write_manifest(
    folder: Path,
    manifest: Mapping[str, Any],
    files: Iterable[Path] = (),
    images: Iterable[Path] = (),
) -> None:
    """Marks a stage complete: its manifest is written last, with checksums of its files."""
    listed = {FILES: checksums_of(files, folder), IMAGES: checksums_of(images, folder)}
    write_document(folder / MANIFEST, {**manifest, **listed})


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The training configuration of a run; None where nothing is trained.

    Raises:
        UserError: its file is damaged, or missing where something was trained.
    """
    path = folder / SETTINGS
    settings = read_document(path, ("method", "rewards", "optimization"))
    if settings is None:
        if (folder / CHECKPOINTS).exists():
            raise UserError(f"{path} is missing; {AGAIN}")
        return None
    with damage_told(path):
        if type(settings.get("seed")) is not int:
            raise ValueError("its seed is no whole number")
        if not isinstance(settings["method"].get("name"), str):
            raise ValueError("its method has no name")
    return settings


def read_document(path: Path, sections: Iterable[str]) -> dict[str, Any] | None:
    """A JSON object that has at least these ``sections``; None where there is no such file.

    Raises:
        UserError: the file is damaged, or one that it lists is missing or damaged.
    """
    with damage_told(path):
        try:
            document = parse_document(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        for section in sections:
            if not isinstance(document.get(section), dict):
                raise ValueError(f"it has no section {section!r}")
    _check_files(path.parent, document.get(FILES, {}))
    return document


def listed(path: Path, section: str) -> dict[str, Any]:
    """The checksums in a section of a document, for those who repair; none where it is damaged."""
    try:
        recorded: dict[str, Any] = parse_document(path.read_bytes()).get(section, {})
    except (OSError, ValueError):
        return {}
    return recorded


def _check_files(folder: Path, recorded: Mapping[str, Any]) -> None:
    for path, found in problems(folder, recorded):
        raise UserError(f"{path} {found}; {AGAIN}")


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """A damaged file is told in one line."""
    try:
        yield
    except (KeyError, ValueError, TypeError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        # A stage is not done again while its manifest says that it is complete.
        files = "it" if path.name == MANIFEST else f"it and the {MANIFEST} beside it"
        raise UserError(
            f"{path}: cannot be read by this version ({text}); delete {files} and {AGAIN}"
        ) from None


def name_of(given: Path, results: Path) -> str:
    """The name, or its beginning, of a run of ``results``; ``results/runs/NAME`` gives NAME.

    Raises:
        UserError: it is a path to elsewhere, and there is no run.
    """
    if given.is_dir() and given.parent != Path():
        raise UserError(f"{given}: is no folder of a run: neither {SETTINGS} nor {EVALUATIONS}/")
    if given.parent != Path() and given.parent.resolve() != (results / "runs").resolve():
        raise UserError(f"{given}: no such run; `g2rpo runs` lists them")
    return given.name


def chosen_names(part: str, names: Iterable[str]) -> list[str]:
    """The one name that ``part`` is or begins, or all that match it where it is a pattern.

    Raises:
        UserError: there is none, or a beginning fits several; in one line with the nearest.
    """
    known = sorted(set(names))
    if part in known:
        return [part]
    matching = fnmatch.filter(known, part)
    if matching:
        return matching
    # Whole words first: seed1 is no beginning of seed101 where there is a seed1.
    fitting = [name for name in known if part and name.startswith(f"{part}-")]
    fitting = fitting or [name for name in known if part and name.startswith(part)]
    if len(fitting) == 1:
        return fitting
    if fitting:
        more = len(fitting) - SHOWN_NAMES
        listed = ", ".join(fitting[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
        raise UserError(f"{part!r} begins the names of several runs: {listed}; give more of it")
    if not known:
        raise UserError(f"no run {part!r}: there are no runs yet; --results names their folder")
    # It is compared with beginnings of its own length, or every long name would look far.
    starts = {name[: len(part)]: name for name in reversed(known)}
    close = difflib.get_close_matches(part, starts, n=1, cutoff=0.5)
    hint = f"did you mean {starts[close[0]]!r}?" if close else "`g2rpo runs` lists them"
    raise UserError(f"no run {part!r}; {hint}")
