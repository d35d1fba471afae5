"""The builder: parts in the order of their needs, kept where nothing changed, none lost."""

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


def test_parts_are_built_once_and_a_failure_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "PARTS", PARTS)
    told: list[str] = []
    (tmp_path / "fail").touch()
    with pytest.raises(UserError, match="the second part failed"):
        build(MiniWorldSettings(), tmp_path, tell=told.append, jobs=2)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["parts"].keys() == {"first", "third"}
    (tmp_path / "fail").unlink()
    told.clear()
    manifest = build(MiniWorldSettings(), tmp_path, tell=told.append)
    assert [line for line in told if "already" in line] == [
        "first: already built",
        "third: already built",
    ]
    assert (tmp_path / "second.txt").read_text() == "1 second"
    assert manifest["parts"]["second"]["measured"] == {"from": "first"}
    assert manifest["files"].keys() == {"first.txt", "second.txt", "third.txt"}
    told.clear()
    (tmp_path / "third.txt").write_text("altered")
    build(MiniWorldSettings(), tmp_path, tell=told.append)
    assert "third: building" in told
    assert "second: building" not in told
    assert (tmp_path / "third.txt").read_text() == "1 third"


def test_other_settings_build_anew_and_unknown_parts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "PARTS", PARTS[:1])
    build(MiniWorldSettings(), tmp_path)
    told: list[str] = []
    changed = MiniWorldSettings(prompts=WorldSettings(test=5))
    build(changed, tmp_path, tell=told.append)
    assert told[0] == "first: building"
    with pytest.raises(UserError, match="no part is called 'fourth'; parts: first"):
        build(changed, tmp_path, frozenset({"fourth"}))


def test_the_small_tokenizer_is_the_same_at_every_build(tmp_path: Path) -> None:
    built = [clip_tokenizer(tmp_path / name, 32) for name in ("one", "two")]
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert {len(built[0].tokenize(word)) for word in words()} == {1}
