"""Every resolved value of a cell, with the layer it comes from."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from g2rpo.policy.config import ImageConfig
from reproduce.experiment.resolving import Layer, Resolver, given, reward_configs

Keys = tuple[str, ...]


def explain(resolver: Resolver, key: str, seed: int) -> list[str]:
    """The lines of a cell's configuration as YAML, with the layer of each value as a comment.

    Raises:
        UserError: no such cell, or an invalid configuration.
    """
    cell, profile = resolver.resolve(key, seed), resolver.profile
    rewards = reward_configs(profile)
    shown = {name: getattr(cell.evaluation, name) for name in ImageConfig.model_fields}
    policy = [Layer("profile", given(profile.policy)), Layer("evaluation", shown)]
    sections: list[tuple[str, Any, Sequence[Layer]]] = [
        ("policy", cell.policy, policy),
        ("evaluation", cell.evaluation, resolver.evaluation_layers(key)),
        ("rewards", rewards, [Layer("profile", {n: given(one) for n, one in rewards.items()})]),
    ]
    if cell.checkpoint is not None:
        origin = Layer("cell", given(cell.checkpoint))
        sections.insert(0, ("checkpoint", cell.checkpoint, [origin]))
    if cell.train is not None:
        sections.insert(0, ("training", cell.train, resolver.training_layers(key, seed)))
    how = "" if cell.preset is None else f", preset {cell.preset}"
    lines = [(f"# {resolver.experiment.name}, {cell.label}, profile {profile.name}{how}", "")]
    for name, value, layers in sections:
        lines += [(f"{name}:", ""), *_lines(value, origins(layers), ())]
    width = max(len(text) for text, origin in lines if origin)
    return [f"{text:<{width}}  # {origin}" if origin else text for text, origin in lines]


def origins(layers: Sequence[Layer]) -> dict[Keys, str]:
    """The last layer that sets each value, by its keys.

    As in :func:`g2rpo.config.merge`, a value that is not a mapping replaces everything below it.
    """
    known: dict[Keys, str] = {}
    for layer in layers:
        for keys in _leaves(layer.settings, ()):
            for old in [old for old in known if old[: len(keys)] == keys[: len(old)]]:
                del known[old]
            known[keys] = layer.origin
    return known


def _leaves(value: Any, keys: Keys) -> Iterator[Keys]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, (*keys, name))
    else:
        yield keys


def _lines(value: Any, known: Mapping[Keys, str], keys: Keys) -> Iterator[tuple[str, str]]:
    """The lines of a section below ``keys``, each with the layer of its value."""
    for name, inner in _items(value):
        below = (*keys, name)
        start = "  " * len(below) + f"{name}:"
        if list(_items(inner)):
            yield start, ""
            yield from _lines(inner, known, below)
        else:
            text = yaml.safe_dump(
                list(inner) if isinstance(inner, tuple) else inner,
                default_flow_style=True, allow_unicode=True, width=10_000,
            ).removesuffix("...\n").strip()  # fmt: skip
            yield f"{start} {text}", known.get(below, "default")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a model or the items of a mapping; nothing for any other value."""
    if isinstance(value, BaseModel):
        yield from ((name, getattr(value, name)) for name in type(value).model_fields)
    elif isinstance(value, Mapping):
        yield from value.items()
