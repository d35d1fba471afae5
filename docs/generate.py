"""Generates the reference pages for `make docs`: command line and configuration."""

import ast
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from benchmarks.evaluation.protocol import EvaluationConfig
from g2rpo.methods.base import Method, method_names, parse_method
from g2rpo.rewards.question import QuestionConfig
from g2rpo.training.config import TrainConfig
from reproduce.cli import app
from reproduce.experiment import Experiment, Profile
from slurm.cluster import Cluster

OUTPUT = Path(__file__).resolve().parent / "generated"
ROOTS: dict[str, list[type[BaseModel]]] = {
    "Training": [TrainConfig],
    "Methods": [type(parse_method({"name": name})) for name in method_names()],
    "Evaluation and rewards": [EvaluationConfig, QuestionConfig],
    "Experiments and profiles": [Experiment, Profile],
    "Clusters": [Cluster],
}
Commands = Iterator[tuple[str, Any]]


def commands(command: Any, path: str = "g2rpo") -> Commands:
    """A command and everything below it, with the words that call each."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}")


def cell(text: object) -> str:
    """Text on one line of a Markdown table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;").strip()


def cli_page() -> str:
    """One section per command: what it does, its arguments and its options."""
    lines = ["# Command line", "", "Every command, as `g2rpo COMMAND --help` prints it.", ""]
    for path, command in commands(typer.main.get_command(app)):
        lines += [f"## {path}", "", inspect.cleandoc(command.help or "").split("\f")[0], ""]
        rows = [
            (
                ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts)),
                "required" if param.required else default(getattr(param, "default", None)),
                cell(getattr(param, "help", None) or ""),
            )
            for param in command.params
            if not getattr(param, "hidden", False) and param.name != "help"
        ]
        lines += table(("argument or option", "default", "description"), rows) if rows else []
    return "\n".join(lines)


def default(value: object) -> str:
    """A default as YAML has it; empty where there is none to show."""
    if value is None or callable(value):
        return ""
    if isinstance(value, BaseModel):
        return "see there"
    text = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else str(value)
    return f"`{cell(text)}`"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """The strings below a model's fields, and below those it inherits."""
    texts: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not (issubclass(base, BaseModel) and base is not BaseModel):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            match (field, text):
                case (ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(ast.Constant(str(words)))):
                    texts[key] = words
    return texts


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models within a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models(inner)


def shown(annotation: Any) -> str:
    """A type in few words; models are links to their section."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return shown(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    parts = [shown(one) for one in inner if one is not ...]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(parts)
    if parts:
        return f"{getattr(origin, '__name__', origin)} of {', '.join(parts)}"
    name = getattr(annotation, "__name__", str(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        anchor = re.sub(r"[^\w -]", "", heading(annotation).lower()).replace(" ", "-")
        return f"[{name}](#{anchor})"
    return {"NoneType": "null", "str": "text", "bool": "boolean"}.get(name, cell(name))


def heading(model: type[BaseModel]) -> str:
    """The heading of a model's section; models with the same name also show their package."""
    if model is Method:
        return "Methods"
    same = [one for one in reachable(*(root for roots in ROOTS.values() for root in roots))
            if one.__name__ == model.__name__]  # fmt: skip
    package = model.__module__.rpartition(".")[0]
    return model.__name__ if len(same) == 1 else f"{model.__name__} of {package}"


@functools.cache
def reachable(*roots: type[BaseModel]) -> tuple[type[BaseModel], ...]:
    """The models that ``roots`` are made of, each once; methods have their own section."""
    queue = list(roots)
    taken: list[type[BaseModel]] = []
    while queue:
        model = queue.pop(0)
        if model not in (*taken, Method):
            taken.append(model)
            queue += [one for f in model.model_fields.values() for one in models(f.annotation)]
    return tuple(taken)


def config_page() -> str:
    """One section per model, each linked from the field that holds it."""
    lines = ["# Configuration", "", INTRODUCTION, ""]
    done: set[type[BaseModel]] = set()
    for title, roots in ROOTS.items():
        lines += [f"## {title}", ""]
        for model in reachable(*roots):
            lines += [] if model in done else section(model)
            done.add(model)
    return "\n".join(lines)


def section(model: type[BaseModel]) -> list[str]:
    """A model's heading, first line and fields."""
    texts = descriptions(model)
    rows = [row(name, field, texts.get(name, "")) for name, field in model.model_fields.items()]
    summary = (inspect.getdoc(model) or "").split("\n\n")[0]
    head = ("key", "type", "default", "description")
    return [f"### {heading(model)}", "", summary, "", *(table(head, rows) if rows else [])]


def row(name: str, field: FieldInfo, text: str) -> tuple[str, str, str, str]:
    """One field."""
    if field.is_required():
        usual = "required"
    elif field.default_factory is not None:
        usual = ""
    else:
        usual = "null" if field.default is None else default(field.default)
    return f"`{name}`", shown(field.annotation), usual, cell(text.replace("``", "`"))


INTRODUCTION = """\
Every key of a YAML file, and of `-s KEY=VALUE`: `-s optimization.iterations=100`. Unknown keys are
rejected with the closest match. `g2rpo config EXPERIMENT CELL` prints every setting of one cell
with the layer it comes from."""


if __name__ == "__main__":
    OUTPUT.mkdir(exist_ok=True)
    for name, text in (("cli.md", cli_page()), ("config.md", config_page())):
        (OUTPUT / name).write_text(text, encoding="utf-8")
