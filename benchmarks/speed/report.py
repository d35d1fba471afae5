"""Reports of the benchmarks: a JSON file and a Markdown page."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from g2rpo.files import atomic_write_text, write_json


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---") -> str:
    """A Markdown table; ``rule`` aligns all columns but the first."""
    ruled = [head, ["---", *[rule] * (len(head) - 1)], *rows]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in ruled)


def write_report(output: Path, name: str, result: Mapping[str, Any], page: str) -> None:
    """Writes ``name.json`` and ``name.md`` into ``output`` and prints the page."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"{name}.json", result)
    atomic_write_text(output / f"{name}.md", page)
    typer.echo(page)
