"""The mini world: scenes, captions, splits, pictures and the grammar of captions."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.mini_world import world
from benchmarks.mini_world.build import captions_of
from benchmarks.mini_world.world import GRAMMAR, Group, Scene, Shown
from g2rpo.errors import UserError
from g2rpo.rewards.attribute_grammar import Grammar, Reading
from g2rpo.rewards.attributes import share
from g2rpo.seeds import generator

ASSETS = Path(world.__file__).parent / "assets"
groups = st.builds(
    Group,
    st.integers(1, 3),
    st.sampled_from(list(world.COLOURS)),
    st.sampled_from(world.SHAPES),
    st.none() | st.sampled_from(list(world.RADII)),
    st.none() | st.sampled_from(list(world.PLACES)),
)


@st.composite
def any_scenes(draw: st.DrawFn) -> Scene:
    """Any scene, not only those that the world samples."""
    members = tuple(draw(st.lists(groups, min_size=1, max_size=3)))
    relation = None
    if len(members) > 1:
        relation = draw(st.none() | st.sampled_from(list(world.RELATIONS)))
    if relation is not None:
        members = tuple(dataclasses.replace(group, place=None) for group in members)
    return Scene(members, draw(st.sampled_from(list(world.BACKGROUNDS))), relation)


scenes = any_scenes().filter(world.is_valid)


def test_same_seed_gives_same_world_and_another_seed_another() -> None:
    def draw(seed: int) -> tuple[list[str], np.ndarray]:
        rng = generator(seed, "test")
        drawn = [world.sample_scene(rng, "train") for _ in range(20)]
        pictures = np.stack([world.render(scene, rng) for scene in drawn])
        return [world.caption(scene, rng) for scene in drawn], pictures

    first, again, other = draw(5), draw(5), draw(6)
    assert first[0] == again[0]
    assert np.array_equal(first[1], again[1])
    assert first[0] != other[0]
    assert world.make_captions(5, "test", 30) == world.make_captions(5, "test", 30)


def test_committed_captions_come_from_the_seed() -> None:
    for split in ("validation", "test", "train"):
        captions = captions_of(ASSETS, split)[:200]
        assert captions == world.make_captions(1, split, 200)


def test_splits_are_disjoint_and_combinations_are_held_out() -> None:
    described = {
        split: {world.scene_of(text) for text in captions_of(ASSETS, split)}
        for split in ("train", "validation", "test")
    }
    for a, b in itertools.combinations(described, 2):
        assert not described[a] & described[b]
    for split in ("train", "validation"):
        for scene in described[split]:
            assert all((g.colour, g.shape) not in world.HELD_OUT_PAIRS for g in scene.groups)
            colours = {g.colour for g in scene.groups}
            assert not any(pair <= colours for pair in world.HELD_OUT_COLOURS)
    seen_in_test = {(g.colour, g.shape) for scene in described["test"] for g in scene.groups}
    assert seen_in_test >= world.HELD_OUT_PAIRS
    share_held_out = np.mean([world.held_out(scene) for scene in described["test"]])
    assert 0.4 < share_held_out < 0.8


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'tets'"):
        world.sample_scene(generator(1, "test"), "tets")


@pytest.mark.parametrize("split", world.SPLITS)
def test_fresh_scenes_belong_to_their_split(split: str) -> None:
    rng = generator(3, "fresh", split)
    accepted = {"train", "judge"} if split == "judge" else {split}
    for _ in range(100):
        assert world.split_of(world.sample_scene(rng, split)) in accepted


@settings(max_examples=100, deadline=None)
@given(scenes, st.integers(0, 2**32))
def test_every_caption_is_read_back_as_its_scene(scene: Scene, seed: int) -> None:
    assert world.scene_of(world.caption(scene)) == scene
    assert world.scene_of(world.caption(scene, generator(seed, "wording"))) == scene


@settings(max_examples=100, deadline=None)
@given(scenes, st.integers(0, 2**32))
def test_an_alteration_changes_one_attribute_and_contradicts_the_picture(
    scene: Scene, seed: int
) -> None:
    rng = generator(seed, "alter")
    options = world.alterations(scene)
    altered = options[int(rng.integers(len(options)))]
    assert world.is_valid(altered)
    pairs = [(scene.background, altered.background), (scene.relation, altered.relation)]
    assert len(scene.groups) == len(altered.groups)
    for a, b in zip(scene.groups, altered.groups, strict=True):
        pairs += zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    assert sum(a != b for a, b in pairs) == 1
    layout = world.lay_out(scene, rng)
    reading = Reading(layout.cells, layout.background)
    assert share(GRAMMAR, scene, reading) == 1
    assert share(GRAMMAR, altered, reading) < 1


@settings(max_examples=50, deadline=None)
@given(scenes, st.integers(0, 2**32))
def test_pictures_show_background_and_shapes_where_the_scene_says(scene: Scene, seed: int) -> None:
    rng = generator(seed, "picture")
    layout = world.lay_out(scene, rng)
    picture = world.draw(layout, rng)
    assert picture.shape == (32, 32, 3)
    assert picture.dtype == np.uint8
    background = np.array(world.BACKGROUNDS[layout.background])
    for cell, shown in enumerate(layout.cells):
        row, column = divmod(cell, 2)
        part = picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].astype(int)
        painted = (np.abs(part - background).max(-1) > 20).sum()
        if shown is None:
            # Only the rim of a large neighbour may reach over the border.
            assert painted <= 12
        else:
            near = np.abs(part - np.array(world.COLOURS[shown.colour])).max(-1) <= 9
            assert near.sum() >= 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red dog on black", "'dog' is not in the world's vocabulary"),
        ("a red circle", "not a complete scene"),
        ("on black", "not a complete scene"),
        ("red circle on black", "unexpected 'circle'"),
        ("a red circle above on black", "not a complete scene"),
        ("a red red circle on black", "unexpected 'red'"),
        ("a red circle on black on pink", "unexpected 'pink'"),
    ],
)
def test_what_is_no_caption_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        world.scene_of(text)


CIRCLE, STAR = Shown("red", "circle", "small"), Shown("blue", "star", "large")


def reading(*cells: Shown | None) -> Reading:
    return Reading((*cells, None, None), "black")


@pytest.mark.parametrize(
    ("text", "shown", "expected"),
    [
        # background, number of shapes, relation; colour and kind of both shapes
        ("a red circle left of a blue star on black", reading(CIRCLE, STAR), (7, 7)),
        ("a red circle left of a blue star on black", reading(STAR, CIRCLE), (6, 7)),
        ("a red circle left of a blue star on black", reading(CIRCLE, None), (3, 7)),
        # the same with two sizes, one of them wrong
        ("a large red circle left of a large blue star on black", reading(CIRCLE, STAR), (8, 9)),
        # a place that does not hold, and another background
        ("a red circle at the top left on pink", reading(None, CIRCLE), (3, 5)),
        # one of two, and one too many
        ("two red circles on black", reading(CIRCLE, None), (3, 6)),
        ("a red circle on black", reading(CIRCLE, CIRCLE), (3, 4)),
        # an empty picture shows its background alone
        ("three red circles on black", reading(None, None), (1, 8)),
        # shapes are matched so that most attributes agree
        ("a red star and a blue circle on black", reading(CIRCLE, STAR), (4, 6)),
    ],
)
def test_agreement_counts_attributes(text: str, shown: Reading, expected: tuple[int, int]) -> None:
    assert GRAMMAR.agreement(world.scene_of(text), shown) == expected
    assert Grammar.model_validate_json(GRAMMAR.model_dump_json()) == GRAMMAR
