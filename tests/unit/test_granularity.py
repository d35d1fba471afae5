"""Node lists of the continuations: examples, brute force, coincidences."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2rpo.flow.granularity import coinciding_granularities, continuation_nodes


def walked_nodes(step: int, granularity: int, steps: int) -> list[int]:
    """The same list found by walking: one single step, then strides while the grid lasts."""
    visited = [step + 1]
    position = step + 2
    while position <= steps:
        visited.append(position)
        position += granularity
    return visited[:-1]


@pytest.mark.parametrize(
    ("step", "granularity", "expected"),
    [
        (0, 1, list(range(1, 16))),
        (0, 2, [1, 2, 4, 6, 8, 10, 12, 14]),
        (1, 2, [2, 3, 5, 7, 9, 11, 13]),
        (0, 3, [1, 2, 5, 8, 11]),
        (7, 1, list(range(8, 16))),
        (14, 1, [15]),
        (14, 3, [15]),
    ],
)
def test_examples_at_sixteen_steps(step: int, granularity: int, expected: list[int]) -> None:
    assert list(continuation_nodes(step, granularity, 16)) == expected


@given(data=st.data(), steps=st.integers(2, 60), granularity=st.integers(1, 70))
@settings(max_examples=300, deadline=None)
def test_properties(data: st.DataObject, steps: int, granularity: int) -> None:
    step = data.draw(st.integers(0, steps - 2))
    nodes = continuation_nodes(step, granularity, steps)
    assert list(nodes) == walked_nodes(step, granularity, steps)
    assert nodes[0] == step + 1
    assert list(nodes[1:2]) in ([], [step + 2])
    assert all(b - a == granularity for a, b in itertools.pairwise(nodes[1:]))
    assert nodes[-1] < steps
    # Nothing that the list could still have held is left out.
    following = step + 2 if len(nodes) == 1 else nodes[-1] + granularity
    assert following <= steps < following + granularity


@pytest.mark.parametrize(
    ("step", "granularity", "steps"),
    [(0, 0, 16), (0, -1, 16), (15, 1, 16), (16, 1, 16), (-1, 1, 16), (1, 1, 2), (0, 1, 1)],
)
def test_impossible_inputs_are_refused(step: int, granularity: int, steps: int) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        continuation_nodes(step, granularity, steps)


@given(
    steps=st.integers(2, 20),
    granularities=st.lists(st.integers(1, 8), min_size=1, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_coincidences_by_brute_force(steps: int, granularities: list[int]) -> None:
    everything = tuple(range(steps - 1))
    found = coinciding_granularities(everything, tuple(granularities), steps)
    for step in everything:
        lists = [tuple(walked_nodes(step, g, steps)) for g in granularities]
        repeated = len(lists) - len(set(lists))
        pairs = [(first, second) for k, first, second in found if k == step]
        assert len(pairs) == repeated
        for first, second in pairs:
            assert walked_nodes(step, first, steps) == walked_nodes(step, second, steps)
