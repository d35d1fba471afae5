"""The bundled experiments, profiles, protocols and suites, and how a name or a path finds one.

Importing this is fast: help texts list the names.
"""

from pathlib import Path

from g2rpo.config import nearest
from g2rpo.errors import UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def bundled_names(folder: str) -> list[str]:
    """The names of the YAML files in a folder such as ``experiments``, sorted."""
    return sorted(path.stem for path in (HERE / folder).glob("*.yaml"))


def named_file(folder: str, name: str) -> Path:
    """The YAML file of a bundled name, or ``name`` itself if it is a path to a YAML file.

    Args:
        folder: ``experiments``, ``profiles``, ``protocols`` or ``suites``.
        name: a name or a path.

    Raises:
        UserError: no such name; names the closest match.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = HERE / folder / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"no {folder[:-1]} {name!r}; {nearest(name, bundled_names(folder))}")
    return path


def absolute(path: str) -> str:
    """``path``, made absolute if it exists only relative to the repository."""
    if Path(path).exists() or not (ROOT / path).exists():
        return path
    return str(ROOT / path)
