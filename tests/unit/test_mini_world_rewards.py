"""What the mini world's reward models learn of pictures and captions."""

import itertools

import torch

from benchmarks.mini_world import world
from benchmarks.mini_world.reward_data import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    GroupPool,
    draw_group_pool,
    facts_of,
    wording_of,
)


def test_pictures_have_the_facts_of_every_two_shapes() -> None:
    pool = draw_group_pool(3, "judge", 30, 3)
    counted = 0
    for cells in pool.cells.flatten(0, 1).tolist():
        shown = [(cell, colour, shape) for cell, (colour, shape, _) in enumerate(cells) if colour]
        pairs = set()
        for (a, *first), (b, *second) in itertools.permutations(shown, 2):
            for apart in ["beside"] * (a % 2 < b % 2) + ["below"] * (a // 2 < b // 2):
                pairs |= {(apart, kind, first[kind], second[kind]) for kind in (0, 1)}
        counted += len(pairs)
    between = 2 * (len(COLOURS) ** 2 + len(SHAPES) ** 2)
    end = 2 * len(COLOURS) + len(BACKGROUNDS)
    assert facts_of(pool)[..., -between - end : -end].sum() == counted


def test_two_wordings_of_one_relation_place_the_same_shapes() -> None:
    texts = [
        "a red circle left of two small blue stars on black",
        "two small blue stars right of a red circle on black",
        "a red circle right of two small blue stars on black",
        "a red circle on the left and two blue stars on black",
    ]
    nothing = torch.zeros(0)
    said = wording_of(GroupPool([texts], nothing, nothing, nothing))[0]
    placed, relation = said[:, -5:-1].tolist(), said[:, -1].tolist()
    circle = [COLOURS.index("red"), SHAPES.index("circle")]
    stars = [COLOURS.index("blue"), SHAPES.index("star")]
    assert placed == [circle + stars, circle + stars, stars + circle, [-100] * 4]
    assert relation == [1 + list(world.RELATIONS).index("left of"), 2, 2, 0]
    groups = said[:, :15].unflatten(1, (3, 5))
    assert groups[0, :2].equal(groups[1, :2].flip(0)), "the groups in the order of the words"
    assert (groups[:, 2] == -100).all()
