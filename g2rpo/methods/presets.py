"""Presets of the methods: training settings in the form of :class:`TrainConfig`.

Each method has a YAML next to its module; one that only combines the rollout of another with an
objective or a kernel is a YAML alone. ``released`` follows its released code; ``matched`` holds
only the method, for comparisons where everything else is the same for all methods.

Code that trains several models has settings for each. A preset may hold a section named by the
class of a diffusers pipeline, which is merged over the rest of the preset for policies of that
class: what is published for Stable Diffusion 3.5 is not another preset, but the same one there.
"""

import itertools
from pathlib import Path
from typing import Any

from g2rpo.config import load_yaml, merge, nearest
from g2rpo.errors import UserError
from g2rpo.methods.base import method_names
from g2rpo.policy.architectures import ARCHITECTURES


def preset_names() -> list[str]:
    """The names of all methods with presets."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def method_summary(name: str) -> str:
    """The comment at the top of a method's YAML, to the end of its first clause."""
    text = Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8")
    lines = itertools.takewhile(lambda line: line.startswith("# "), text.splitlines())
    return " ".join(line.removeprefix("# ") for line in lines).partition(". ")[0]


def load_preset(method: str, preset: str, pipeline: str = "") -> dict[str, Any]:
    """The settings of ``preset``: a layer for :func:`g2rpo.config.merge`.

    Args:
        method: the name of a method, or the path of a YAML with presets.
        preset: its name.
        pipeline: the class of the policy's pipeline; empty for the settings of all of them.

    Raises:
        UserError: unknown method or preset.
    """
    data = _presets(method)
    sections = {name: section for name, section in data.items() if isinstance(section, dict)}
    if preset not in sections:
        raise UserError(f"no preset {preset!r} for {method}; {nearest(preset, sections)}")
    section = sections[preset]
    shared = {key: value for key, value in section.items() if key not in ARCHITECTURES}
    return merge(shared, section.get(pipeline, {}))


def method_label(method: str) -> str:
    """The ``label`` of a method in tables.

    Raises:
        UserError: unknown method.
    """
    return str(_presets(method).get("label", method))


def _presets(method: str) -> dict[str, Any]:
    path = Path(method)
    if path.suffix not in (".yaml", ".yml"):
        path = Path(__file__).parent / f"{method}.yaml"
        if not path.exists() and method in method_names():
            raise UserError(
                f"method {method!r} has no presets; write g2rpo/methods/{method}.yaml "
                "(docs/extending.md)"
            )
        if not path.exists():
            raise UserError(f"no method {method!r}; {nearest(method, preset_names())}")
    return load_yaml(path)
