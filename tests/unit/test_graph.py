"""Graphs of stages: order, mistakes, and what is left of them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.graph import Graph, Stage


def stage(name: str, needs: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> Stage:
    return Stage(name, "train", name, needs=needs, after=after)


@st.composite
def stages(draw: st.DrawFn) -> list[Stage]:
    """Stages that depend on earlier ones alone, shuffled."""
    made: list[Stage] = []
    for index in range(draw(st.integers(0, 9))):
        earlier = st.lists(st.sampled_from(range(index)), max_size=3, unique=True)
        before = draw(earlier) if index else []
        cut = draw(st.integers(0, len(before)))
        names = tuple(f"s{number}" for number in before)
        made.append(stage(f"s{index}", names[:cut], names[cut:]))
    return list(draw(st.permutations(made)))


@given(stages())
def test_every_stage_comes_after_what_it_depends_on(listed: list[Stage]) -> None:
    seen: set[str] = set()
    graph = Graph(listed)
    for one in graph.stages.values():
        assert seen.issuperset({*one.needs, *one.after})
        seen.add(one.name)
    assert seen == {one.name for one in listed}
    assert len(graph) == len(listed)


@given(stages(), st.data())
def test_without_what_is_done_the_rest_stays_as_it_was(
    listed: list[Stage], data: st.DataObject
) -> None:
    graph = Graph(listed)
    done = set(data.draw(st.lists(st.sampled_from([*graph.stages, "no stage"]), unique=True)))
    left = graph.without(done)
    assert set(left.stages) == set(graph.stages) - done
    for name, one in left.stages.items():
        before = graph[name]
        assert one.needs == tuple(other for other in before.needs if other not in done)
        assert one.after == tuple(other for other in before.after if other not in done)
        assert replace(one, needs=before.needs, after=before.after) == before


@given(stages(), st.data())
def test_downstream_is_closed_and_no_larger_than_it_must_be(
    listed: list[Stage], data: st.DataObject
) -> None:
    graph = Graph(listed)
    names = set(data.draw(st.lists(st.sampled_from([*graph.stages, "no stage"]), unique=True)))
    found = graph.downstream(names)
    assert names <= found
    for one in graph.stages.values():
        expected = one.name in names or bool(found.intersection(one.needs))
        assert (one.name in found) == expected


def test_stages_that_could_come_next_keep_their_order() -> None:
    listed = [stage("b"), stage("z", ("b",)), stage("a"), stage("y", after=("a",)), stage("c")]
    assert list(Graph(listed).stages) == ["b", "a", "c", "z", "y"]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([stage("a"), stage("a")], "same name"),
        ([stage("a", ("absent",))], "a depends on unknown stage absent"),
        ([stage("a", after=("absent",))], "absent"),
        (
            [stage("a", ("b",)), stage("b", after=("a",))],
            "dependency cycle: a -> b -> a|b -> a -> b",
        ),
        ([stage("a", ("a",))], "dependency cycle"),
    ],
)
def test_invalid_graphs_are_rejected(listed: list[Stage], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graph(listed)
