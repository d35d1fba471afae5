"""Atomic writes and hashes."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from g2rpo.files import (
    atomic_folder,
    atomic_path,
    atomic_write_bytes,
    atomic_write_text,
    guarded_folder,
    sha256_files,
    sha256_tree,
    writable_by_others,
    write_json,
)


class InterruptedWriteError(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- files ---------------------------------------------------------------------------------------


def test_a_finished_write_replaces_the_file(tmp_path: Path) -> None:
    file = tmp_path / "deeper" / "state.bin"
    atomic_write_bytes(file, b"old")
    atomic_write_bytes(file, b"new")
    assert file.read_bytes() == b"new"
    assert names(file.parent) == ["state.bin"]
    atomic_write_text(file, "Größe σ\n")
    assert file.read_bytes() == "Größe σ\n".encode()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "state.bin"
    file.write_bytes(b"old")
    with pytest.raises(InterruptedWriteError), atomic_path(file) as temporary:  # noqa: PT012
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"half")
        assert file.read_bytes() == b"old"
        raise InterruptedWriteError
    assert file.read_bytes() == b"old"
    assert names(tmp_path) == ["state.bin"]


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("x")
    atomic_write_text(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == ordinary.stat().st_mode
    (tmp_path / "folder").mkdir()
    with atomic_folder(tmp_path / "atomic_folder") as temporary:
        (temporary / "a").write_text("x")
    assert (tmp_path / "atomic_folder").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_json_is_sorted_and_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"b": 1, "a": [1.5, None, "σ"]})
    assert json.loads(file.read_text()) == {"a": [1.5, None, "σ"], "b": 1}
    assert file.read_text().index('"a"') < file.read_text().index('"b"')
    before = file.read_text()
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"loss": float("nan")})
    assert file.read_text() == before


# --- folders -------------------------------------------------------------------------------------


def fill(folder: Path, content: str) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "weights").write_text(content)
    (folder / "config").write_text(content)


def test_a_finished_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    with atomic_folder(target) as temporary:
        assert temporary.name.startswith(".checkpoint.") and temporary.name.endswith(".tmp")
        fill(temporary, "old")
        (temporary / "extra").write_text("only in the old one")
        assert not target.exists()
    with atomic_folder(target) as temporary:
        fill(temporary, "new")
        assert (target / "config").read_text() == "old"
    assert names(target) == ["config", "deep"]
    assert (target / "deep" / "weights").read_text() == "new"
    assert names(tmp_path) == ["checkpoint"]


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    with atomic_folder(target) as temporary:
        fill(temporary, "old")
    with pytest.raises(InterruptedWriteError), atomic_folder(target) as temporary:  # noqa: PT012
        fill(temporary, "half")
        raise InterruptedWriteError
    assert (target / "deep" / "weights").read_text() == "old"
    assert names(tmp_path) == ["checkpoint"]


def test_the_old_folder_is_moved_away_before_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment does the name stand for a folder that is half deleted."""
    target = tmp_path / "checkpoint"
    with atomic_folder(target) as temporary:
        fill(temporary, "old")
    deleted: list[Path] = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: deleted.append(Path(path)))
    with atomic_folder(target) as temporary:
        fill(temporary, "new")
    assert target not in deleted
    assert (target / "config").read_text() == "new"


# --- hashes --------------------------------------------------------------------------------------


def test_sha256_tree_sees_names_contents_and_places(tmp_path: Path) -> None:
    def tree(name: str, files: dict[str, str]) -> str:
        folder = tmp_path / name
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content)
        return sha256_tree(folder)

    reference = tree("reference", {"a": "1", "b/c": "2"})
    assert tree("same", {"b/c": "2", "a": "1"}) == reference
    others = [
        tree("content", {"a": "1", "b/c": "3"}),
        tree("name", {"a": "1", "b/d": "2"}),
        tree("place", {"a": "1", "c": "2"}),
        tree("swapped", {"a": "2", "b/c": "1"}),
        tree("fewer", {"a": "1"}),
        tree("more", {"a": "1", "b/c": "2", "e": ""}),
    ]
    assert len({reference, *others}) == 7
    os.utime(tmp_path / "reference" / "a", (0, 0))
    assert sha256_tree(tmp_path / "reference") == reference


def test_sha256_files_is_the_files_own_or_one_over_names_and_hashes(tmp_path: Path) -> None:
    one, two = tmp_path / "a.bin", tmp_path / "b.bin"
    one.write_bytes(b"first")
    two.write_bytes(b"second")
    first, second = (hashlib.sha256(data).hexdigest() for data in (b"first", b"second"))
    assert sha256_files([one]) == first
    listing = f"a.bin {first}\nb.bin {second}\n"
    assert sha256_files([one, two]) == hashlib.sha256(listing.encode()).hexdigest()
    assert sha256_files([one], lambda path: f"known {path.name}") == "known a.bin"


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o755), (0o000, 0o755), (0o077, 0o700)])
def test_a_guarded_folder_is_not_writable_by_others(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        guarded_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == mode
    assert not writable_by_others(tmp_path / "a" / "b")
    (tmp_path / "a" / "b").chmod(0o775)
    assert writable_by_others(tmp_path / "a" / "b")
    (tmp_path / "a" / "b").chmod(0o1777)  # as /tmp is: others cannot replace what is in it
    assert not writable_by_others(tmp_path / "a" / "b")
