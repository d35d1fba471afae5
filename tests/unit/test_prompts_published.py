"""The published prompt sets: counted, parted the same way every time, written for profiles."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, serve, use_empty_caches
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from g2rpo.data.overlap import normalise, overlap
from g2rpo.data.prompts import read_prompts
from g2rpo.errors import UserError
from g2rpo.hub import lock, prompt_sets
from g2rpo.hub.catalogue import Catalogue, catalogue
from g2rpo.hub.prompt_sets import split_validation
from reproduce.commands.prompts import app

REPO = "Tencent-Hunyuan/MixGRPO"
TRAIN = [f"a picture of {n} cats" for n in range(900)] + ["", "  padded ", "Test Prompt 3!"]
TEST = [f"test prompt {n}" for n in range(40)]
STYLES = ("anime", "concept-art", "paintings", "photo")


def small_catalogue() -> Catalogue:
    """The catalogue with lists of other lengths and without hashes."""
    counts = {"hpdv2-train": len(TRAIN), "hpdv2-test": len(TEST), "hpsv2-benchmark": 8}
    artifacts = []
    for artifact in catalogue().artifacts:
        if artifact.name in counts:
            files = tuple(
                f.model_copy(update={"size": None, "sha256": None}) for f in artifact.files
            )
            change = {"prompts": counts[artifact.name], "files": files}
            artifacts.append(artifact.model_copy(update=change))
    return Catalogue(artifacts=tuple(artifacts))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    use_empty_caches(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    small = small_catalogue()
    for module in (prompt_sets, lock):
        monkeypatch.setattr(module, "catalogue", lambda: small)
    with serve() as running:
        running.add(REPO, "data/prompts.txt", ("\n".join(TRAIN) + "\n").encode())
        running.add(REPO, "data/prompts_test.txt", ("\n".join(TEST) + "\n").encode())
        for style in STYLES:
            texts = [f"{style} {n}" for n in range(2)]
            running.add("zhwang/HPDv2", f"benchmark/{style}.json", json.dumps(texts).encode())
        yield running


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_the_files_of_the_profile_flux_are_written(hub: FakeHub, tmp_path: Path) -> None:
    result = run("fetch", "--mirror", hub.address)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "data" / "hpdv2"
    train, validation, test = (
        read_prompts(folder / f"{name}.txt") for name in ("train", "validation", "test")
    )
    assert [prompt.text for prompt in test] == TEST
    assert len(validation) == 400
    assert len(train) + len(validation) == len(TRAIN) - 1  # without the empty line
    assert overlap(train, validation).normalised == ()
    assert overlap(validation, test).normalised == ()
    assert overlap(train, test).normalised == ("test prompt 3",)  # reported by `check`, not removed
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.log.clear()
    assert run("fetch", "--offline").exit_code == 0
    assert hub.log == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_benchmark_keeps_its_styles(hub: FakeHub, tmp_path: Path) -> None:
    output = tmp_path / "b"
    result = run("fetch", "hpsv2-benchmark", "--output", str(output), "--mirror", hub.address)
    assert result.exit_code == 0, result.output
    prompts = read_prompts(output / "benchmark.jsonl")
    assert [p.style for p in prompts] == [style for style in STYLES for _ in range(2)]
    assert prompts[3].id == "concept-art-00001"
    assert "cached" in run("list").output


def test_a_list_of_another_length_is_refused(hub: FakeHub) -> None:
    hub.add(REPO, "data/prompts_test.txt", b"one\ntwo\n")
    error = run("fetch", "--mirror", hub.address).exception
    assert isinstance(error, UserError)
    assert "hpdv2-test: 2 prompts, expected 40" in str(error)
    hub.add("zhwang/HPDv2", "benchmark/anime.json", b"{}")
    error = run("fetch", "hpsv2-benchmark", "--mirror", hub.address).exception
    assert isinstance(error, UserError)
    assert "anime.json is not a list of prompts" in str(error)
    error = run("fetch", "hpd").exception
    assert isinstance(error, UserError)
    assert "unknown prompt set 'hpd'; did you mean 'hpdv2'?" in str(error)


def test_the_published_test_list_is_checked_by_its_hash(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_sets, "catalogue", catalogue)
    artifact = prompt_sets.artifact_named("hpdv2-test")
    assert (artifact.prompts, artifact.files[0].size) == (400, 32967)
    hub.add(REPO, "data/prompts_test.txt", b"x" * 32967)
    with pytest.raises(UserError, match=r"prompts_test\.txt is altered.*expected 6eb1c5561a58…"):
        prompt_sets.fetch(artifact, lock.Lock(), prompt_sets.FetchOptions(hub.address))


@given(
    train=st.lists(st.text("ab .!", min_size=1), min_size=1, max_size=40),
    test=st.lists(st.text("ab .!", min_size=1), max_size=5),
    count=st.integers(1, 5),
)
def test_the_split_is_disjoint_whole_and_independent_of_order(
    train: list[str], test: list[str], count: int
) -> None:
    distinct = {normalise(text) for text in train} - {normalise(text) for text in test}
    if len(distinct) <= count:
        with pytest.raises(UserError, match="cannot hold out"):
            split_validation(train, test, count)
        return
    rest, validation = split_validation(train, test, count)
    keys = {normalise(text) for text in validation}
    assert len(keys) == len(validation) == count
    assert not keys & {normalise(text) for text in rest}
    assert not keys & {normalise(text) for text in test}
    assert {normalise(text) for text in [*rest, *validation]} == {normalise(t) for t in train}
    again = split_validation(train[::-1], test, count)[1]
    assert {normalise(text) for text in again} == keys


def test_the_split_does_not_change_between_versions() -> None:
    _, validation = split_validation([f"prompt {n}" for n in range(1000)], [], 400)
    digest = hashlib.sha256("\n".join(validation).encode()).hexdigest()
    assert digest == "066a8d4520509f409d6df952b1868f8b1763a826d9e6065dc2f594327cc734f4"
