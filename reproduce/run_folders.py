"""Run folders as they are found on disk, and the names that people call them by.

Nothing here imports a model library: runs are listed on login nodes.
"""

import difflib
import fnmatch
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from g2rpo.errors import UserError
from g2rpo.files import write_json

SETTINGS = "config.json"
EVALUATIONS = "evaluations"
MANIFEST = "manifest.json"
SHOWN_NAMES = 4
"""Names that are told where a prefix fits several."""


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a training run, or a base or checkpoint that was evaluated."""
    return (folder / SETTINGS).is_file() or (folder / EVALUATIONS).is_dir()


def run_folders(runs_folder: Path) -> list[Path]:
    """The runs in a folder, by name."""
    if not runs_folder.is_dir():
        return []
    return sorted(folder for folder in runs_folder.iterdir() if is_run(folder))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete stage; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    return read_document(folder / MANIFEST, ("provenance",))


def sound_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete stage; None as well where it is damaged.

    For those who decide what is left to do: such a stage is done again, which mends it.
    """
    try:
        return read_manifest(folder)
    except UserError:
        return None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Marks a stage complete: its manifest is written last."""
    write_json(folder / MANIFEST, manifest)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The training configuration of a run; None where nothing is trained.

    Raises:
        UserError: its file is damaged.
    """
    path = folder / SETTINGS
    settings = read_document(path, ("method", "rewards", "optimization"))
    if settings is None:
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
        UserError: the file is damaged.
    """
    with damage_told(path):
        try:
            document: Any = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not isinstance(document, dict):
            raise TypeError("no JSON object")
        for section in sections:
            if not isinstance(document.get(section), dict):
                raise ValueError(f"it has no section {section!r}")
    return document


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
            f"{path}: cannot be read by this version ({text}); "
            f"delete {files} and run the command that wrote it again"
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
