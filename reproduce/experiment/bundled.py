"""Where the bundled experiments, profiles and presets are, and how a name finds one."""

from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints

from benchmarks.evaluation.results import Name
from g2rpo.config import nearest
from g2rpo.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parents[1]

FolderName = Annotated[Name, StringConstraints(max_length=80)]
"""Of an experiment or a profile."""


def named_file(folder: str, name: str, what: str) -> Path:
    """The YAML of a bundled ``name``, or the file that ``name`` itself is a path of."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = HERE / folder / f"{name}.yaml"
    if not path.exists():
        valid = [found.stem for found in (HERE / folder).glob("*.yaml")]
        raise UserError(f"no {what} {name!r}; {nearest(name, valid)}")
    return path


def absolute(path: str) -> str:
    """``path`` where it exists from here, else where it exists in the repository, else itself."""
    if Path(path).exists() or not (ROOT / path).exists():
        return path
    return str(ROOT / path)
