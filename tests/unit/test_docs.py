"""The documentation names links, commands and options that exist, and stays short."""

import itertools
import json
import os
import re
import runpy
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pydantic
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image
from typer.testing import CliRunner

from benchmarks.evaluation.protocol import EvaluationConfig
from g2rpo.methods.base import Method, method_names, parse_method
from g2rpo.policy.config import CheckpointConfig
from g2rpo.rewards.question import QuestionConfig
from g2rpo.rewards.server import ServerConfig
from g2rpo.training.config import TrainConfig
from reproduce.cli import app
from reproduce.experiment import ROOT, Hardware, load_experiment

DOCS = sorted((ROOT / "docs").glob("*.md"))
UNREAD = {"build", "data", "generated", "runs", "node_modules"}
EXPERIMENTS = sorted((ROOT / "reproduce" / "experiments").glob("*.yaml"))
PARSER = MarkdownIt("commonmark").enable("table")
METHODS = [type(parse_method({"name": name})) for name in method_names()]
SECTIONS: dict[str, list[Any]] = {
    **{name: [field.annotation] for name, field in TrainConfig.model_fields.items()},
    "method": METHODS,
    "evaluation": [EvaluationConfig],
    "hardware": [Hardware],
    "question": [QuestionConfig],
    "server": [ServerConfig],
    "checkpoint": [CheckpointConfig],
}
"""The first part of a dotted key, and the models that have the rest."""


def pages() -> Iterator[Path]:
    for folder, inner, files in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in UNREAD and not name.startswith(".")]
        yield from (Path(folder) / name for name in files if name.endswith(".md"))


def tokens(page: Path) -> Iterator[Token]:
    for token in PARSER.parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        target = token.attrGet("href") or token.attrGet("src")
        if target is not None and not re.match(r"[a-z]+:", str(target)):
            yield unquote(str(target))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code forges make them."""
    found: dict[str, int] = {}
    slugs = set()
    tree = PARSER.parse(page.read_text(encoding="utf-8"))
    for opening, heading in itertools.pairwise(tree):
        if opening.type == "heading_open":
            text = "".join(child.content for child in heading.children or ())
            slug = re.sub(r"[^\w\- ]|²", "", text.lower()).replace(" ", "-")
            number = found.get(slug, -1) + 1
            found[slug] = number
            slugs.add(f"{slug}-{number}" if number else slug)
    return slugs


def broken(page: Path) -> Iterator[str]:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            yield f"{page.relative_to(ROOT)}: {link} leads nowhere"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"{page.relative_to(ROOT)}: {link}: no such heading"


def test_links_and_anchors_exist() -> None:
    found = list(pages())
    assert ROOT / "README.md" in found and ROOT / "docs" / "index.md" in found
    assert sum(len(list(links(page))) for page in found) > 100
    assert [fault for page in found for fault in broken(page)] == []


def test_broken_links_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# One: `two` & three\n## Again\n## Again\n"
        "[a](#one-two--three) [b](page.md#again-1) [c](#again-2) [d](gone.md) ![e](gone.png) "
        "[f](https://example.org) [g](../outside)\n"
    )
    assert list(broken(page)) == [
        "page.md: #again-2: no such heading",
        "page.md: gone.md leads nowhere",
        "page.md: gone.png leads nowhere",
        "page.md: ../outside leads nowhere",
    ]


def commands(page: Path) -> Iterator[str]:
    """What a page tells its reader to type: lines of code blocks, and code within text."""
    for token in tokens(page):
        if token.type == "fence" and token.info != "python":
            yield from token.content.splitlines()
        elif token.type == "code_inline":
            yield token.content


TYPED = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", TYPED, ids=lambda page: page.name)
def test_targets_and_verbs_that_a_page_names_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+)(?= [a-z0-9 -]*:|:)", makefile, re.MULTILINE))
    verbs = {
        str(c.name or c.callback.__name__).replace("_", "-")
        for c in app.registered_commands
        if c.callback
    }
    verbs |= {str(group.name) for group in app.registered_groups}
    for line in commands(page):
        if made := re.match(r"\s*make ((?:[a-z0-9-]+ ?)+)", line):
            assert set(made[1].split()) - targets == set(), line
        if called := re.match(r"\s*(?:\.venv/bin/)?g2rpo ([a-z-]+)\b", line):
            assert called[1] in verbs, line


def models(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """The models that a value of this type may be."""
    if isinstance(annotation, type) and issubclass(annotation, Method):
        return [*METHODS] if annotation is Method else [annotation]
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in models(inner)]


def has_key(annotations: list[Any], parts: list[str]) -> bool:
    if not parts:
        return True
    for annotation in annotations:
        mapping = typing.get_origin(annotation) is dict
        if mapping and has_key(list(typing.get_args(annotation)[1:]), parts[1:]):
            return True
        for model in models(annotation):
            field = model.model_fields.get(parts[0])
            if field is not None and has_key([field.annotation], parts[1:]):
                return True
    return False


ATTRIBUTES = {"policy.conditioning_source"}
"""Of objects in Python."""
FILES = {"bib", "csv", "html", "json", "jsonl", "md", "parquet", "pdf", "png", "tex", "txt", "yaml"}


@pytest.mark.parametrize("page", TYPED, ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page: Path) -> None:
    unknown = []
    for code in commands(page):
        for key, end in re.findall(r"(?<![\w./<-])([a-z_]+(?:\.(?:[a-z_]+|<name>))+)(.?)", code):
            section, *rest = key.split(".")
            if section not in SECTIONS or key in ATTRIBUTES or end in ("(", "/"):
                continue
            if rest[-1] in FILES:
                continue
            if not has_key(SECTIONS[section], rest):
                unknown.append(key)
    assert unknown == []


def test_options_are_looked_up() -> None:
    assert has_key(SECTIONS["method"], ["granularities"])
    assert has_key(SECTIONS["execution"], ["offload", "rewards"])
    assert has_key(SECTIONS["rewards"], ["<name>", "weight"])
    assert not has_key(SECTIONS["optimization"], ["lr"])
    assert not has_key(SECTIONS["grid"], ["steps", "more"])


def test_the_catalogue_has_every_experiment() -> None:
    catalogue = (ROOT / "docs" / "experiments.md").read_text()
    for path in EXPERIMENTS:
        cells = len(load_experiment(path.stem).cells)
        row = rf"^\|.*`(?:make reproduce-)?{path.stem}`.*\| {cells} \|"
        assert re.search(row, catalogue, re.MULTILINE), f"docs/experiments.md lacks {path.stem}"
    listed = re.findall(r"`(?:make reproduce-)?([a-z0-9-]+)` \|", catalogue)
    assert set(listed) <= {path.stem for path in EXPERIMENTS}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_starts_with_its_purpose_and_a_command(page: Path) -> None:
    opening = page.read_text().split("\n## ")[0]
    assert re.match(r"# .+\n\n[A-Z]", opening)
    assert re.search(
        r"^(?:\.venv/bin/)?(?:g2rpo|make|python) |`(?:g2rpo|make) ", opening, re.MULTILINE
    )


def test_the_documentation_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900
    # The ledger grows with every method, and examples are whole files.
    pages = [page.read_text() for page in DOCS if page.name != "fidelity.md"]
    prose = [re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE) for page in pages]
    assert sum(len(page.split()) for page in prose) <= 10_300


def test_the_generated_reference_has_every_command_and_key() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    cli, config = generate["cli_page"](), generate["config_page"]()
    for command in ("reproduce", "weights fetch", "check cluster"):
        assert f"\n## g2rpo {command}\n" in cli
    assert "| `--seeds` |" in cli
    for name, annotation in TrainConfig.model_fields.items():
        assert f"| `{name}` |" in config
        for model in models(annotation.annotation):
            assert model is Method or f"\n### {model.__name__}" in config
    assert re.search(r"^\| `clip_range` \| float \| `0.0001` \| The ratio is clipped", config, re.M)


def test_the_readme_shows_the_committed_results() -> None:
    readme = runpy.run_path(str(ROOT / "docs" / "readme.py"))
    text = (ROOT / "README.md").read_text()
    assert readme["markdown"]() in text, "run `make readme`"
    table = json.loads((ROOT / "results" / "mini" / "table1" / "table1.json").read_text())
    for row in table["rows"]:
        if row["trained_on"] in ([], ["hps"]):
            line = re.escape(f"| {row['label']} | {row['scores']['hps']['mean']:.3f}")
            assert re.search(rf"^{line}\b", text, re.MULTILINE)
    base = table["rows"][0]["scores"]["hps"]
    printed = rf"Base +{base['mean']:.3f} .*\n +\[{base['low']:.3f}, {base['high']:.3f}\]\n"
    assert re.search(printed, text), "the output of `make mini`"

    picture = ROOT / "docs" / "pictures.png"
    assert picture.stat().st_size <= 400_000
    sheet = np.array(Image.open(readme["RESULTS"] / "pictures.png").convert("RGB"))
    shown = np.array(Image.open(picture).convert("RGB"))
    for prompt, (column, _) in itertools.product(range(4), enumerate(readme["rows"]())):
        image = sheet[readme["tile_at"](prompt, column)].repeat(3, 0).repeat(3, 1)
        top, left = 40 + 136 * prompt, 150 + 104 * column
        assert np.array_equal(shown[top : top + 96, left : left + 96], image)


def test_the_examples_of_comparisons_run_on_the_committed_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT / "results" / "mini" / "table1" / "cells")
    examples = re.findall(
        r"^g2rpo compare (.*json.*)$", (ROOT / "docs" / "results.md").read_text(), re.M
    )
    assert len(examples) == 2
    for example in examples:
        # The shell expands patterns.
        names = [
            name
            for word in shlex.split(example)
            for name in sorted(map(str, Path().glob(word))) or [word]
        ]
        done = CliRunner().invoke(app, ["compare", *names])
        assert done.exit_code == 0, f"{example}: {done.exception}"
        assert "Held-out" in done.stdout
