"""Parses captions of a world of coloured shapes and compares them with images.

The world is data: :class:`Grammar` has the phrases, the layout of cells and the relations, and is
stored with the weights of the attribute reward. A caption describes one to three groups of shapes,
e.g. "two small red circles above a blue square on a black background".
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import Field

from g2rpo.config import StrictModel
from g2rpo.errors import UserError


@dataclass(frozen=True)
class Group:
    """``count`` shapes with the same attributes; None where the caption does not specify one."""

    count: int
    colour: str
    shape: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """A parsed caption; ``relation`` is between the first and the second group."""

    groups: tuple[Group, ...]
    background: str
    relation: str | None = None

    def objects(self) -> list[tuple[int, Group]]:
        """Every shape with the index of its group."""
        return [
            (index, group) for index, group in enumerate(self.groups) for _ in range(group.count)
        ]


@dataclass(frozen=True)
class Shown:
    """A shape in an image."""

    colour: str
    shape: str
    size: str


@dataclass(frozen=True)
class Reading:
    """The contents of an image: a shape or None per cell, and the background."""

    cells: tuple[Shown | None, ...]
    background: str


class Grammar(StrictModel):
    """The phrases of the captions and the geometry they refer to."""

    counts: dict[str, int]
    sizes: dict[str, str]
    colours: dict[str, str]
    shapes: dict[str, str]
    """Singular and plural words to shapes."""
    places: dict[str, str]
    """Phrases such as ``at the top left`` to places."""
    relations: dict[str, str]
    backgrounds: dict[str, str]
    joints: list[str]
    """Words that only separate groups."""
    cells: int = Field(ge=1)
    """Number of cells of the layout; an image shows at most one shape in each."""
    place_cells: dict[str, list[int]]
    """The cells that belong to each place."""
    relation_cells: dict[str, list[tuple[int, int]]]
    """The pairs of cells for which each relation holds."""

    @cached_property
    def _phrases(self) -> dict[tuple[str, ...], tuple[str, str | int]]:
        tables: dict[str, Mapping[str, str | int]] = {
            "count": self.counts,
            "size": self.sizes,
            "colour": self.colours,
            "shape": self.shapes,
            "place": self.places,
            "relation": self.relations,
            "background": self.backgrounds,
            "joint": {word: word for word in self.joints},
        }
        return {
            _words(phrase): (kind, value)
            for kind, table in tables.items()
            for phrase, value in table.items()
        }

    @cached_property
    def _longest(self) -> int:
        return max(len(words) for words in self._phrases)

    def _terms(self, caption: str) -> Iterator[tuple[str, str | int]]:
        words = _words(caption)
        position = 0
        while position < len(words):
            for length in range(min(self._longest, len(words) - position), 0, -1):
                term = self._phrases.get(words[position : position + length])
                if term is not None:
                    yield term
                    position += length
                    break
            else:
                raise UserError(
                    f"caption {caption!r}: {words[position]!r} is not in the world's vocabulary"
                )

    def parse(self, caption: str) -> Scene:
        """The scene that ``caption`` describes.

        Raises:
            UserError: a word outside the vocabulary, or an incomplete scene.
        """
        groups: list[Group] = []
        relation: str | None = None
        background: str | None = None
        parts: dict[str, str | int] = {}
        for kind, value in self._terms(caption):
            if kind == "background" and background is None:
                background = str(value)
            elif kind == "place" and groups and not parts and groups[-1].place is None:
                last = groups.pop()
                groups.append(Group(last.count, last.colour, last.shape, last.size, str(value)))
            elif kind == "relation" and len(groups) == 1 and relation is None and not parts:
                relation = str(value)
            elif kind == "shape" and "count" in parts and "colour" in parts:
                size = parts.get("size")
                groups.append(
                    Group(
                        int(parts["count"]),
                        str(parts["colour"]),
                        str(value),
                        None if size is None else str(size),
                    )
                )
                parts = {}
            elif kind in ("count", "size", "colour") and kind not in parts:
                parts[kind] = value
            elif kind != "joint":
                raise UserError(f"caption {caption!r}: unexpected {value!r}")
        unfinished = parts or not groups or (relation is not None and len(groups) < 2)
        if background is None or unfinished:
            raise UserError(f"caption {caption!r}: not a complete scene")
        return Scene(tuple(groups), background, relation)

    @cached_property
    def _arrangements(self) -> dict[Scene, list[tuple[int, ...]]]:
        return {}

    def arrangements(self, scene: Scene) -> list[tuple[int, ...]]:
        """All assignments of cells to the objects of ``scene`` that it allows."""
        # Only counts, places and the relation matter, so few searches serve all scenes.
        groups = tuple(Group(group.count, "", "", None, group.place) for group in scene.groups)
        bare = Scene(groups, "", scene.relation)
        found = self._arrangements.get(bare)
        if found is None:
            found = self._arrangements[bare] = [
                cells
                for cells in itertools.permutations(range(self.cells), len(scene.objects()))
                if all(
                    group.place is None or cell in self.place_cells[group.place]
                    for (_, group), cell in zip(scene.objects(), cells, strict=True)
                )
                and self._related(scene, cells)
            ]
        return found

    def _related(self, scene: Scene, cells: Sequence[int]) -> bool:
        if scene.relation is None:
            return True
        pairs = self.relation_cells[scene.relation]
        members = [index for index, _ in scene.objects()]
        first = [cell for index, cell in zip(members, cells, strict=True) if index == 0]
        second = [cell for index, cell in zip(members, cells, strict=True) if index == 1]
        return all((a, b) in pairs for a in first for b in second)

    def agreement(self, scene: Scene, reading: Reading) -> tuple[int, int]:
        """How many attributes of ``scene`` an image shows, and how many there are.

        The attributes are the background, the number of shapes, the relation, and for each shape
        its colour, kind and, if specified, size and place. Shapes of the caption are matched with
        shapes of the image so that the most attributes agree.
        """
        objects = scene.objects()
        total = 2 + (scene.relation is not None)
        total += sum(2 + (g.size is not None) + (g.place is not None) for _, g in objects)
        shown = sum(cell is not None for cell in reading.cells)
        always = int(reading.background == scene.background) + int(shown == len(objects))
        table = [
            [self._object_agreement(group, cell, reading.cells[cell]) for cell in range(self.cells)]
            for _, group in objects
        ]
        best = 0
        for cells in itertools.permutations(range(self.cells), len(objects)):
            found = sum(row[cell] for row, cell in zip(table, cells, strict=True))
            if scene.relation is not None and all(reading.cells[cell] for cell in cells):
                found += self._related(scene, cells)
            best = max(best, found)
        return always + best, total

    def _object_agreement(self, group: Group, cell: int, shown: Shown | None) -> int:
        if shown is None:
            return 0
        return (
            (group.colour == shown.colour)
            + (group.shape == shown.shape)
            + (group.size is not None and group.size == shown.size)
            + (group.place is not None and cell in self.place_cells[group.place])
        )


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z]+|[^a-z\s]", text.lower()))
