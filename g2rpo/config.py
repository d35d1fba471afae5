"""Typed configuration: strict pydantic models, YAML files, ``key=value`` overrides.

Each component defines its own small model next to its code; this module has the shared parts.
Errors are one line with the key, what is wrong, and the closest valid key.
"""

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import pydantic
from pydantic_core import CoreSchema, PydanticCustomError

from g2rpo.errors import UserError
from g2rpo.yaml_text import parse_yaml

LARGEST = 1e20
"""Largest number in a setting; a few of them may be multiplied without overflow in float32."""
_LEAST_SIMILARITY = 0.6
"""Least similarity, 0 to 1, of a name that is suggested for another; difflib's default."""


def _no_coercion(schema: Any) -> None:
    """Makes every number and boolean in ``schema`` strict, and bounds it."""
    if isinstance(schema, dict):
        if schema.get("type") in ("int", "float", "bool"):
            schema["strict"] = True
        if schema.get("type") == "float":
            schema.setdefault("le", LARGEST)
        for key, inner in schema.items():
            if key != "default":
                _no_coercion(inner)
    elif isinstance(schema, (list, tuple)):
        for inner in schema:
            _no_coercion(inner)


class StrictModel(pydantic.BaseModel):
    """Base of all configuration models: rejects unknown keys and does not convert values.

    ``true`` is not a number, ``"10"`` and 10.0 are not integers and 1 is not a boolean. Integers
    are valid floats, and lists are valid tuples. A float is at most 1e20.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: pydantic.GetCoreSchemaHandler
    ) -> CoreSchema:
        """Pydantic's schema without conversions; its ``strict`` would also reject lists."""
        schema = handler(source)
        _no_coercion(schema)
        return schema

    @pydantic.model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, data: Any) -> Any:
        """Rejects an unknown key before anything else is reported."""
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for key in data if isinstance(data, Mapping) else ():
            if key not in known:
                context = {"key": str(key), "model": cls}
                raise PydanticCustomError("unknown_key", "unknown key {key!r}", context)
        return data

    @classmethod
    def concrete(cls, data: Any) -> type[Self]:
        """The class that ``data`` stands for: a subclass if it names one."""
        del data
        return cls


def unhashed(default: Any, **constraints: Any) -> Any:
    """A field that is left out of dumps while it has its default, so that old hashes stay valid."""
    return pydantic.Field(default, exclude_if=lambda value: value == default, **constraints)


RENAMED_KEYS = {
    "continuations": "approximate_rollout",
    "fusion": "granularity_reduction",
    "optimizer_step": "update_every",
    "pictured_every": "preview_every",
    "pictured_prompts": "preview_prompts",
    "shortened": "budget_overrides",
    "tuned_as": "learning_rate_key",
}
"""Old names of keys and their current ones, for error messages."""

REMOVED_KEYS = {
    "engine": "remove it; it follows from the training settings",
    "paper_profiles": "set `paper_model: true` in a profile instead",
    "profiles": "remove it; a table shows the rewards of the profile",
    "tensorboard": "use `trackers: [tensorboard]`, or `trackers: []` for none",
    "rows": "cells are the rows; set their `label`, `group` and `paper`",
}
"""Removed keys and what to do instead, for error messages."""

Model = TypeVar("Model", bound=pydantic.BaseModel)
Location = tuple[int | str, ...]


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint with the first of the valid names closest to ``name``, or with all valid names."""
    names = sorted(valid)

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, other, name).ratio()

    closest = max(names, key=likeness, default="")
    if names and likeness(closest) >= _LEAST_SIMILARITY:
        return f"did you mean {closest!r}?"
    return "valid: " + ", ".join(names)


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping; raises :class:`UserError` if the file is missing or malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping, found a {type(value).__name__}")
    return value


def _at(data: Any, location: Location) -> Any:
    """The value of ``data`` at ``location``, or None."""
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _models(annotation: Any) -> Iterator[type[StrictModel]]:
    """The configuration models that ``annotation`` allows."""
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for member in typing.get_args(annotation):
            yield from _models(member)


def _hint(model: type[StrictModel], place: Location, data: Any) -> str:
    """What the unknown key at ``place`` of ``data``, a key of ``model``, probably means."""
    key = str(place[-1])
    known = {field.alias or name: field for name, field in model.model_fields.items()}
    renamed = RENAMED_KEYS.get(key)
    if renamed in known:
        return f"it was renamed to {renamed!r}"
    if key in REMOVED_KEYS:
        return REMOVED_KEYS[key]
    inner = [
        f"{name}.{key}"
        for name, field in known.items()
        for option in _models(field.annotation)
        if key in option.concrete(_at(data, (name,))).model_fields
    ]
    # Deeper down, a key of that name is more often meant for its own section.
    if inner and len(place) == 1:
        return f"did you mean {' or '.join(sorted(map(repr, inner)))}?"
    return nearest(key, known)


_FIXES = {
    "string_type": "; put it in quotes",
    "bool_type": "; write true or false",
    "tuple_type": "; write a list, [a, b]",
    "model_type": "; write keys and values, {key: value}",
    "dict_type": "; write keys and values, {key: value}",
}


def _fix(kind: str, found: str | float | bool) -> str:
    """How to write a value of the wrong type; empty if that is obvious."""
    if kind not in ("int_type", "float_type"):
        return _FIXES.get(kind, "")
    if isinstance(found, str):
        return "; write a plain number, without quotes, underscores or units"
    return f"; write {found:.0f}" if isinstance(found, float) and found.is_integer() else ""


def _one_line(error: pydantic.ValidationError, data: Any) -> str:
    errors = error.errors(include_url=False)
    first = errors[0]
    location, peers = first["loc"], [first]
    key = ".".join(str(part) for part in location)
    if first["type"] == "unknown_key":
        context = first["ctx"]
        place = (*location, context["key"])
        key = ".".join(map(str, place))
        return f"unknown key {key!r}; {_hint(context['model'], place, data)}"
    if first["type"] == "missing":
        return f"missing key {key!r}"
    found = first.get("input")
    if location and _at(data, location[:-1]) is found:
        # A union has one error per member, with the member's name as the last part of the location.
        key = ".".join(str(part) for part in location[:-1])
        peers = [each for each in errors if each["loc"][:-1] == location[:-1]]
    messages = dict.fromkeys(each["msg"].removeprefix("Value error, ") for each in peers)
    message = " or ".join(text[:1].lower() + text[1:] for text in messages)
    more = len(errors) - len(peers)
    rest = f" (and {more} more)" if more else ""
    shown = ""
    if found is None:
        shown = " (found null)"
    elif isinstance(found, (str, int, float, bool)):
        shown = f" (found {found!r}{_fix(first['type'], found)})"
    if not key or message.startswith((f"{key}.", f"{key}:")):
        return f"{message}{rest}"
    return f"{key}: {message}{shown}{rest}"


def validate(model: type[Model], data: Any, where: str) -> Model:
    """Builds ``model`` from ``data``.

    Raises:
        UserError: one line with ``where``, the key, what is wrong and the closest valid key.
    """
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        message = " ".join(_one_line(error, data).split())
        raise UserError(f"{where}: {message}") from None


def merge(base: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` updated with each of ``changes``, recursively."""
    merged = dict(base)
    for change in changes:
        for key, value in change.items():
            old = merged.get(key)
            if isinstance(old, Mapping) and isinstance(value, Mapping):
                merged[key] = merge(old, value)
            else:
                merged[key] = value
    return merged


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Turns ``["a.b=1", "c=[1, 2]"]`` into a nested mapping; values are parsed as YAML."""
    result: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        parts = key.strip().split(".")
        if not separator or not all(parts):
            raise UserError(
                f"override {assignment!r}: expected key=value, e.g. optimization.iterations=10"
            )
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise UserError(f"override {assignment!r}: not valid YAML: {error}") from None
        nested: Any = value
        for part in reversed(parts):
            nested = {part: nested}
        result = merge(result, nested)
    return result


def content_hash(value: Any) -> str:
    """A short hash of JSON-like ``value``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
