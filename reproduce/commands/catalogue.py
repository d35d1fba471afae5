"""``g2rpo list``: what is bundled: experiments, profiles, suites, methods and rewards."""

import ast
from importlib.util import find_spec
from pathlib import Path

from g2rpo.config import load_yaml
from g2rpo.terminal import plain_table, wide_console
from reproduce.bundled import bundled_names, named_file


def list_bundled() -> None:
    """List the bundled experiments, profiles, suites, protocols, methods and rewards."""
    from g2rpo.methods.base import method_names
    from g2rpo.methods.presets import method_summary, preset_names
    from g2rpo.rewards.registry import REWARDS

    table = plain_table("kind", "name", "description")
    for name in bundled_names("experiments"):
        shown = load_yaml(named_file("experiments", name))["table"]
        table.add_row("experiment", name, shown["title"])
    for folder in ("profiles", "suites", "protocols"):
        for name in bundled_names(folder):
            table.add_row(folder[:-1], name, load_yaml(named_file(folder, name))["description"])
    for name in preset_names():
        coded = name in method_names()
        summary = _summary(f"g2rpo.methods.{name}") if coded else method_summary(name)
        table.add_row("method", name, summary)
    for name, target in REWARDS.items():
        table.add_row("reward", name, _summary(target.partition(":")[0]))
    wide_console().print(table)


def _summary(module: str) -> str:
    """The first line of a module's docstring, without importing it: rewards load slowly."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]
