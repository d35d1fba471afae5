"""The mini world: scenes of one to three coloured shapes, their captions and their pictures.

A scene is what its caption says (:class:`g2rpo.rewards.attribute_grammar.Scene`). Whatever the
caption leaves open (sizes, free cells, small shifts and tints) is drawn at random. The layout is
2×2 cells of 16 pixels, numbered row by row, with at most one shape in each.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo.rewards.attribute_grammar import Grammar, Group, Scene, Shown
from g2rpo.seeds import generator

__all__ = ["GRAMMAR", "Group", "Scene", "Shown"]

Floats = NDArray[np.floating[Any]]

RESOLUTION = 32
CELL = 16
SUPERSAMPLING = 3

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "green": (36, 170, 60),
    "blue": (50, 84, 235),
    "yellow": (245, 225, 50),
    "purple": (160, 50, 200),
    "orange": (250, 140, 25),
    "white": (248, 248, 248),
    "cyan": (60, 215, 225),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 14),
    "gray": (124, 124, 124),
    "brown": (104, 66, 34),
    "pink": (250, 178, 200),
}
RADII: dict[str, float] = {"small": 4.4, "large": 6.7}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COUNT_WORDS = {1: "a", 2: "two", 3: "three"}
PLACES: dict[str, tuple[str, list[int]]] = {
    "left": ("on the left", [0, 2]),
    "right": ("on the right", [1, 3]),
    "top": ("at the top", [0, 1]),
    "bottom": ("at the bottom", [2, 3]),
    "top left": ("at the top left", [0]),
    "top right": ("at the top right", [1]),
    "bottom left": ("at the bottom left", [2]),
    "bottom right": ("at the bottom right", [3]),
}
SIDES = ("left", "right", "top", "bottom")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
RELATIONS: dict[str, tuple[tuple[str, ...], Callable[[int, int], bool]]] = {
    "left of": (("left of",), lambda a, b: a % 2 < b % 2),
    "right of": (("right of",), lambda a, b: a % 2 > b % 2),
    "above": (("above", "over"), lambda a, b: a // 2 < b // 2),
    "below": (("below", "under"), lambda a, b: a // 2 > b // 2),
}
OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "left": "right",
    "right": "left",
    "top": "bottom",
    "bottom": "top",
}
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "circle"),
        ("blue", "triangle"),
        ("yellow", "ring"),
        ("purple", "square"),
        ("cyan", "cross"),
    }
)
"""Colour-shape pairs that never occur in training or validation scenes."""
HELD_OUT_COLOURS = frozenset(
    {frozenset({"red", "cyan"}), frozenset({"green", "orange"}), frozenset({"white", "purple"})}
)
"""Colour pairs that never occur together in training or validation scenes."""
SPLITS = ("train", "validation", "test", "judge")
"""``judge`` (to train reward models) has every combination but no validation or test caption."""


def _grammar() -> Grammar:
    cells = range(4)
    return Grammar(
        counts={"a": 1, "an": 1, "one": 1, "two": 2, "three": 3},
        sizes={size: size for size in RADII},
        colours={colour: colour for colour in COLOURS},
        shapes={shape: shape for shape in SHAPES} | {plural(shape): shape for shape in SHAPES},
        places={phrase: place for place, (phrase, _) in PLACES.items()},
        relations={
            phrase: relation for relation, (phrases, _) in RELATIONS.items() for phrase in phrases
        },
        backgrounds={f"on {name}": name for name in BACKGROUNDS},
        joints=["and", ","],
        cells=4,
        place_cells={place: list(where) for place, (_, where) in PLACES.items()},
        relation_cells={
            relation: [(a, b) for a in cells for b in cells if holds(a, b)]
            for relation, (_, holds) in RELATIONS.items()
        },
    )


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


GRAMMAR = _grammar()


def is_valid(scene: Scene) -> bool:
    """Whether ``scene`` can be drawn and described without ambiguity.

    A caption names places or a relation, not both: "at the top left of" could be read two ways.
    """
    if scene.relation is not None and any(group.place for group in scene.groups):
        return False
    kinds = {(group.colour, group.shape) for group in scene.groups}
    return (
        1 <= len(scene.objects()) <= 3
        and len(kinds) == len(scene.groups)
        and bool(GRAMMAR.arrangements(scene))
    )


def held_out(scene: Scene) -> bool:
    """Whether ``scene`` has a combination held out from training."""
    if any((group.colour, group.shape) in HELD_OUT_PAIRS for group in scene.groups):
        return True
    colours = [group.colour for group in scene.groups]
    return any(frozenset({a, b}) in HELD_OUT_COLOURS for a in colours for b in colours)


def split_of(scene: Scene) -> str:
    """The split of ``scene``, by a stable hash of its caption."""
    bucket = hashlib.sha256(caption(scene).encode()).digest()[0]
    if bucket < 24:
        return "test"
    if held_out(scene):
        return "judge"
    return "validation" if bucket < 48 else "train"


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """A random valid scene of ``split`` (one of :data:`SPLITS`).

    At least half of the test scenes have a held-out combination; ``judge`` has all scenes outside
    the test and validation splits.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}")
    want_held_out = split == "test" and rng.random() < 0.5
    accepted = ("train", "judge") if split == "judge" else (split,)
    while True:
        scene = _propose(rng)
        if want_held_out and not held_out(scene):
            continue
        if is_valid(scene) and split_of(scene) in accepted:
            return scene


def _choose(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _propose(rng: np.random.Generator) -> Scene:
    counts = [(1,), (2,), (3,), (1, 1), (2, 1), (1, 2), (1, 1, 1)]
    chosen = counts[int(rng.choice(7, p=[0.1, 0.1, 0.05, 0.25, 0.125, 0.125, 0.25]))]
    relation = None
    if len(chosen) > 1 and rng.random() < 0.6:
        relation = _choose(rng, list(RELATIONS))
    groups = []
    for count in chosen:
        place = None
        if relation is None and len(chosen) < 3 and count < 3 and rng.random() < 0.4:
            place = _choose(rng, SIDES if count == 2 else SIDES + CORNERS)
        size = _choose(rng, list(RADII)) if rng.random() < 0.5 else None
        groups.append(Group(count, _choose(rng, list(COLOURS)), _choose(rng, SHAPES), size, place))
    return Scene(tuple(groups), _choose(rng, list(BACKGROUNDS)), relation)


def _group_words(group: Group) -> str:
    words = [COUNT_WORDS[group.count]]
    if group.count == 1 and (group.size or group.colour)[0] in "aeiou":
        words = ["an"]
    if group.size is not None:
        words.append(group.size)
    words += [group.colour, group.shape if group.count == 1 else plural(group.shape)]
    if group.place is not None:
        words.append(PLACES[group.place][0])
    return " ".join(words)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """``scene`` in plain English, in a random wording if ``rng`` is given."""
    phrases = [_group_words(group) for group in scene.groups]
    if scene.relation is not None:
        wordings = RELATIONS[scene.relation][0]
        between = wordings[0] if rng is None else _choose(rng, wordings)
        phrases[:2] = [f"{phrases[0]} {between} {phrases[1]}"]
    text = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"{text} on {scene.background}"


def scene_of(text: str) -> Scene:
    """The scene that a caption describes (inverse of :func:`caption`)."""
    return GRAMMAR.parse(text)


def alterations(scene: Scene) -> list[Scene]:
    """Every valid scene that differs from ``scene`` in exactly one attribute."""
    changed = [
        dataclasses.replace(scene, background=name)
        for name in BACKGROUNDS
        if name != scene.background
    ]
    if scene.relation is not None:
        changed.append(dataclasses.replace(scene, relation=OPPOSITE[scene.relation]))
    for index, group in enumerate(scene.groups):
        options = [dataclasses.replace(group, colour=c) for c in COLOURS if c != group.colour]
        options += [dataclasses.replace(group, shape=s) for s in SHAPES if s != group.shape]
        options += [dataclasses.replace(group, count=n) for n in (1, 2, 3) if n != group.count]
        if group.size is not None:
            options += [dataclasses.replace(group, size=s) for s in RADII if s != group.size]
        if group.place in OPPOSITE:
            options.append(dataclasses.replace(group, place=OPPOSITE[group.place]))
        elif group.place is not None:
            options += [dataclasses.replace(group, place=p) for p in CORNERS if p != group.place]
        changed += [
            dataclasses.replace(
                scene, groups=(*scene.groups[:index], option, *scene.groups[index + 1 :])
            )
            for option in options
        ]
    return [option for option in changed if is_valid(option)]


def altered_attribute(scene: Scene, other: Scene) -> str:
    """The name of the attribute in which two scenes of one structure differ."""
    if scene.background != other.background:
        return "background"
    if scene.relation != other.relation:
        return "relation"
    for a, b in zip(scene.groups, other.groups, strict=True):
        for field in dataclasses.fields(Group):
            if getattr(a, field.name) != getattr(b, field.name):
                return field.name
    raise ValueError("the scenes do not differ")


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to draw a scene: the contents of each cell."""

    cells: tuple[Shown | None, ...]
    background: str


def lay_out(scene: Scene, rng: np.random.Generator) -> Layout:
    """A random layout: draws the sizes and cells that the caption leaves open."""
    arrangements = GRAMMAR.arrangements(scene)
    chosen = arrangements[int(rng.integers(len(arrangements)))]
    cells: list[Shown | None] = [None] * GRAMMAR.cells
    for (_, group), cell in zip(scene.objects(), chosen, strict=True):
        size = group.size or _choose(rng, list(RADII))
        cells[cell] = Shown(group.colour, group.shape, size)
    return Layout(tuple(cells), scene.background)


def draw(layout: Layout, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture ``[32, 32, 3]`` of a layout, with small random shifts, sizes and tints."""
    picture: Floats = np.empty((RESOLUTION, RESOLUTION, 3), np.float32)
    picture[:] = _tint(BACKGROUNDS[layout.background], rng)
    for cell, shown in enumerate(layout.cells):
        if shown is None:
            continue
        row, column = divmod(cell, 2)
        centre_x = CELL * column + CELL / 2 + rng.uniform(-1.1, 1.1)
        centre_y = CELL * row + CELL / 2 + rng.uniform(-1.1, 1.1)
        radius = RADII[shown.size] * rng.uniform(0.94, 1.06)
        colour = _tint(COLOURS[shown.colour], rng)
        rows, columns = _window(centre_y, radius), _window(centre_x, radius)
        cover = _coverage(shown.shape, columns, rows, (centre_x, centre_y), radius)[..., None]
        picture[rows, columns] = picture[rows, columns] * (1 - cover) + colour * cover
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture ``[32, 32, 3]`` of ``scene``, as RGB bytes."""
    return draw(lay_out(scene, rng), rng)


def _tint(colour: tuple[int, int, int], rng: np.random.Generator) -> Floats:
    return np.asarray(colour, np.float32) + rng.uniform(-8, 8, 3).astype(np.float32)


def _window(centre: float, r: float) -> slice:
    """The pixels of a row or column that a shape of radius ``r`` can touch."""
    return slice(max(0, math.floor(centre - r)), min(RESOLUTION, math.ceil(centre + r)))


def _coverage(
    shape: str, columns: slice, rows: slice, centre: tuple[float, float], r: float
) -> Floats:
    """The share of each pixel of a window that a shape of radius ``r`` around ``centre`` covers."""
    x = _subpixels(columns) - centre[0]
    y = _subpixels(rows) - centre[1]
    inside = _inside(shape, x[None, :], y[:, None], r)
    parts = inside.reshape(len(y) // SUPERSAMPLING, SUPERSAMPLING, -1, SUPERSAMPLING)
    cover: Floats = parts.mean((1, 3), dtype=np.float32)
    return cover


def _subpixels(window: slice) -> Floats:
    first, last = window.start * SUPERSAMPLING, window.stop * SUPERSAMPLING
    return (np.arange(first, last, dtype=np.float32) + 0.5) / SUPERSAMPLING


def _inside(shape: str, x: Floats, y: Floats, r: float) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_]
    if shape == "circle":
        inside = x**2 + y**2 <= r**2
    elif shape == "ring":
        distance = x**2 + y**2
        inside = (distance <= r**2) & (distance >= (0.5 * r) ** 2)
    elif shape == "square":
        inside = np.maximum(np.abs(x), np.abs(y)) <= 0.86 * r
    elif shape == "cross":
        arm = np.minimum(np.abs(x), np.abs(y)) <= 0.32 * r
        inside = arm & (np.maximum(np.abs(x), np.abs(y)) <= r)
    elif shape == "triangle":
        inside = (y <= 0.8 * r) & (np.abs(x) <= (y + r) * 0.56)
    else:
        angle = np.arctan2(x, -y)
        part = np.abs((angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
        # A five-pointed star: the edge runs from a tip at radius r to a notch at 0.46 r.
        notch_x, notch_y = 0.46 * r * math.cos(math.pi / 5), 0.46 * r * math.sin(math.pi / 5)
        along, across = np.hypot(x, y) * np.cos(part), np.hypot(x, y) * np.sin(part)
        inside = across * (r - notch_x) <= notch_y * (r - along)
    return inside


def make_captions(seed: int, split: str, number: int) -> list[str]:
    """``number`` distinct captions of ``split`` from ``seed``; no two describe one scene."""
    found: dict[Scene, str] = {}
    rng = generator(seed, f"captions-{split}")
    while len(found) < number:
        scene = sample_scene(rng, split)
        wording = caption(scene, rng)
        found.setdefault(scene, wording)
    return list(found.values())
