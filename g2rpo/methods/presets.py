"""The presets of the methods: settings of a training, as :class:`TrainConfig` takes them.

Each method has a YAML beside its module. ``released`` is what its own code does; ``matched`` is the
method itself, where everything else is to be the same for all methods.
"""

from pathlib import Path
from typing import Any

from g2rpo.config import load_yaml, nearest
from g2rpo.errors import UserError
from g2rpo.methods.base import method_names


def load_preset(method: str, preset: str) -> dict[str, Any]:
    """The settings of ``preset``: a layer for :func:`g2rpo.config.merge`.

    Args:
        method: the name of a method, or the path of a YAML with presets.
        preset: its section.

    Raises:
        UserError: there is no such method or section.
    """
    data = _presets(method)
    sections = {name: section for name, section in data.items() if isinstance(section, dict)}
    if preset not in sections:
        raise UserError(f"presets of {method}: no section {preset!r}; {nearest(preset, sections)}")
    return sections[preset]


def method_label(method: str) -> str:
    """What tables call a method: the ``label`` beside its presets.

    Raises:
        UserError: there is no such method.
    """
    return str(_presets(method).get("label", method))


def _presets(method: str) -> dict[str, Any]:
    path = Path(method)
    if path.suffix not in (".yaml", ".yml"):
        path = Path(__file__).with_name(f"{method}.yaml")
        if not path.exists():
            raise UserError(f"no method preset {method!r}; {nearest(method, method_names())}")
    return load_yaml(path)
