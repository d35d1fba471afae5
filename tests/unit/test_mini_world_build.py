"""The builder: unchanged parts are kept, changed ones are rebuilt, a failure loses nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mini_world import build as builder
from benchmarks.mini_world.build import MANIFEST, MiniWorldSettings, Part, WorldSettings, build
from benchmarks.mini_world.tokenizers import clip_tokenizer, words
from g2rpo.errors import UserError


def build_first(settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    (assets / "first.txt").write_text(str(settings.seed))
    return {"from": "nothing"}


def build_second(settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    if (assets / "fail").exists():
        raise UserError("the second part failed")
    (assets / "second.txt").write_text((assets / "first.txt").read_text() + " second")
    return {"from": "first"}


def build_third(settings: MiniWorldSettings, assets: Path) -> dict[str, Any]:
    (assets / "third.txt").write_text((assets / "first.txt").read_text() + " third")
    return {"from": "first"}


class PlainPart(Part):
    """A part whose settings are the numbers of captions, whatever it is called."""

    def settings(self, settings: MiniWorldSettings) -> dict[str, Any]:
        return settings.prompts.model_dump(mode="json")


PARTS = (
    PlainPart("first", ("first.txt",), (), build_first),
    PlainPart("second", ("second.txt",), ("first",), build_second),
    PlainPart("third", ("third.txt",), ("first",), build_third),
)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "PARTS", PARTS)


def built(assets: Path, **settings: Any) -> list[str]:
    """The parts that a build of these settings builds."""
    log: list[str] = []
    build(MiniWorldSettings(**settings), assets, log=log.append, processes=1)
    return [line.split(":")[0] for line in log if line.endswith(": building")]


def test_a_failed_build_resumes_and_only_changed_parts_are_rebuilt(tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    with pytest.raises(UserError, match="the second part failed"):
        built(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["parts"].keys() == {"first"}
    (tmp_path / "fail").unlink()
    assert built(tmp_path) == ["second", "third"]
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["parts"]["second"]["measured"] == {"from": "first"}
    assert manifest["files"].keys() == {"first.txt", "second.txt", "third.txt"}
    assert manifest["last_build"]["parts"] == ["second", "third"]
    (tmp_path / "third.txt").write_text("altered")
    assert built(tmp_path) == ["third"]
    assert (tmp_path / "third.txt").read_text() == "1 third"
    assert built(tmp_path, prompts=WorldSettings(test=5)) == ["first", "second", "third"]
    with pytest.raises(UserError, match="--rebuild fourth: no such part; choose from first, sec"):
        build(MiniWorldSettings(), tmp_path, frozenset({"fourth"}))


def test_the_number_of_processes_makes_no_difference(tmp_path: Path) -> None:
    manifests = [
        build(MiniWorldSettings(), tmp_path / str(number), processes=number) for number in (1, 2)
    ]
    assert manifests[0]["files"] == manifests[1]["files"]
    parts = [{n: p["outputs"] for n, p in m["parts"].items()} for m in manifests]
    assert parts[0] == parts[1]


def test_the_small_tokenizer_is_the_same_at_every_build(tmp_path: Path) -> None:
    tokenizers = [clip_tokenizer(tmp_path / name, 32) for name in ("one", "two")]
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert {len(tokenizers[0].tokenize(word)) for word in words()} == {1}
