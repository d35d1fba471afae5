"""The Markdown of the repository: what it links, names and lists is there."""

import itertools
import os
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pydantic
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from typer.testing import CliRunner

from benchmarks.evaluation.protocol import EvaluationConfig
from g2rpo.methods.base import Method, method_names, parse_method
from g2rpo.policy.config import CheckpointConfig
from g2rpo.rewards.question import QuestionConfig
from g2rpo.training.config import TrainConfig
from reproduce.cli import app
from reproduce.experiment import ROOT, Hardware, load_experiment

ELSEWHERE = "/mnt/"
"""Paths of an example that are on nobody's machine."""
DOCS = sorted((ROOT / "docs").glob("*.md"))
UNREAD = {"build", "data", "runs", "node_modules"}
EXPERIMENTS = sorted((ROOT / "reproduce" / "experiments").glob("*.yaml"))
PARSER = MarkdownIt("commonmark").enable("table")
METHODS = [type(parse_method({"name": name})) for name in method_names()]
SECTIONS: dict[str, list[Any]] = {
    **{name: [field.annotation] for name, field in TrainConfig.model_fields.items()},
    "method": METHODS,
    "evaluation": [EvaluationConfig],
    "hardware": [Hardware],
    "question": [QuestionConfig],
    "checkpoint": [CheckpointConfig],
}
"""What a dotted key of a page may begin with, and the models in which it goes on."""


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


def test_links_and_anchors_lead_somewhere() -> None:
    found = list(pages())
    assert ROOT / "README.md" in found and ROOT / "docs" / "index.md" in found
    assert sum(len(list(links(page))) for page in found) > 100
    assert [fault for page in found for fault in broken(page)] == []


def test_a_link_that_leads_nowhere_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
    verbs = {str(c.name or c.callback.__name__) for c in app.registered_commands if c.callback}
    verbs |= {str(group.name) for group in app.registered_groups}
    for line in commands(page):
        if made := re.match(r"\s*make ((?:[a-z0-9-]+ ?)+)", line):
            assert set(made[1].split()) - targets == set(), line
        if called := re.match(r"\s*(?:\.venv/bin/)?g2rpo ([a-z]+)\b", line):
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


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_catalogue_has_every_experiment(path: Path) -> None:
    catalogue = (ROOT / "docs" / "experiments.md").read_text()
    cells = len(load_experiment(path.stem).cells)
    assert f"\n## {path.stem}\n" in catalogue, f"{path.name} has no section in docs/experiments.md"
    assert re.search(rf"^\| \[{path.stem}\]\(#{path.stem}\) \| {cells} \|", catalogue, re.MULTILINE)


def test_the_catalogue_has_no_other_experiments() -> None:
    catalogue = (ROOT / "docs" / "experiments.md").read_text()
    listed = set(re.findall(r"^\| \[([a-z0-9-]+)\]\(#", catalogue, re.MULTILINE))
    assert listed == {path.stem for path in EXPERIMENTS}


def comparisons() -> Iterator[tuple[Path, list[str]]]:
    """The examples of `g2rpo compare`: the folder that each is called in, and its arguments."""
    for token in PARSER.parse((ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")):
        folder = ROOT
        for line in token.content.splitlines() if token.type == "fence" else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["cd"]:
                folder /= words[1]
            elif words[:2] == ["g2rpo", "compare"] and ELSEWHERE not in line:
                yield folder, words[2:]


@pytest.mark.parametrize(("folder", "arguments"), list(comparisons()))
def test_the_examples_of_comparisons_run_on_the_committed_results(
    folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    # As a shell does.
    names = [name for one in arguments for name in sorted(map(str, Path().glob(one))) or [one]]
    done = CliRunner().invoke(app, ["compare", *names])
    assert done.exit_code == 0, f"{arguments}: {done.exception}"
    assert "Held-out" in done.stdout


def test_examples_of_comparisons_are_found() -> None:
    found = list(comparisons())
    assert any(argument.endswith(".json") for _, arguments in found for argument in arguments)
    assert any(folder == ROOT for folder, _ in found)
