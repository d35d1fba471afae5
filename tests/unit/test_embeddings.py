"""The embedding cache: what is written is what is read, whatever happens to process and disk."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from fake_encoder import Recorder, encode, prompts_of, settings
from safetensors import safe_open
from tiny_flux import build_tiny_flux

from g2rpo.checksums import hashing_up_to
from g2rpo.data.embeddings import CacheKey, EmbeddingCache, FillSettings, fill, prompt_key
from g2rpo.errors import UserError
from g2rpo.policy import folder as policy_folder
from g2rpo.policy.folder import text_fingerprint

ROOT = Path(__file__).resolve().parents[2]


def filled(folder: Path, count: int = 10) -> EmbeddingCache:
    cache = EmbeddingCache(folder)
    fill(cache, prompts_of(count), Recorder(), settings())
    return cache


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def assert_holds(cache: EmbeddingCache, count: int) -> None:
    found = cache.read(prompts_of(count))
    assert list(found) == sorted(found, key=list(found).index)
    assert found.keys() == set(prompts_of(count))
    for prompt, rows in found.items():
        expected = encode(prompt)
        assert rows.keys() == expected.keys()
        for name, value in expected.items():
            assert rows[name].dtype == value.dtype and torch.equal(rows[name], value)


# Format


def test_what_is_written_is_what_another_process_reads(tmp_path: Path) -> None:
    filled(tmp_path / "cache")
    again = EmbeddingCache(tmp_path / "cache")
    assert_holds(again, 10)
    assert len(again) == 10 and "prompt number 3" in again
    # The exact text is the key.
    assert again.missing(["prompt number 3 ", "Prompt number 3", "prompt number 4"]) == [
        "prompt number 3 ", "Prompt number 3",
    ]  # fmt: skip
    assert again.read(["unknown"]) == {}
    shapes = []
    for shard in shards(tmp_path / "cache"):
        with safe_open(shard, framework="pt") as opened:
            shapes.append(opened.get_slice("prompt_embeds").get_shape())
    assert sorted(shapes) == [[2, 5, 8], [4, 5, 8], [4, 5, 8]]


def test_nothing_is_encoded_twice_and_new_prompts_are_added(tmp_path: Path) -> None:
    filled(tmp_path)
    before = contents(tmp_path)
    same = Recorder()
    assert fill(EmbeddingCache(tmp_path), prompts_of(10) * 2, same, settings()) == 0
    assert same.loads == 0
    assert contents(tmp_path) == before

    other = ["something new", *prompts_of(4), "something else", "something new"]
    added = Recorder()
    cache = EmbeddingCache(tmp_path)
    assert fill(cache, other, added, settings()) == 2
    assert added.encoded == ["something new", "something else"]
    assert before.items() <= contents(tmp_path).items()
    assert cache.read(other).keys() == set(other)


def test_a_reader_sees_what_another_adds_and_takes_away(tmp_path: Path) -> None:
    reader = EmbeddingCache(tmp_path / "cache")
    keys = frozenset(map(prompt_key, prompts_of(10)))
    assert not reader.holds(keys)
    filled(tmp_path / "cache")
    assert reader.holds(keys) and reader.holds(keys)
    shutil.rmtree(tmp_path / "cache")
    assert not reader.holds(keys)
    assert reader.read(prompts_of(10)) == {}


def test_a_shard_holds_as_many_prompts_as_fit() -> None:
    flux = (512 * 4096 + 768) * 2
    assert FillSettings(flux).per_shard == 64
    assert FillSettings(2 * flux).per_shard == 32
    assert FillSettings(10).per_shard == 1024
    assert FillSettings(2**40).per_shard == 1


def test_reading_takes_the_memory_of_what_is_read(tmp_path: Path) -> None:
    row = {"prompt_embeds": torch.ones(2**18)}
    plan = FillSettings(2**20, shard_prompts=128)
    fill(EmbeddingCache(tmp_path), prompts_of(128), lambda _: lambda _: row, plan)
    (shard,) = shards(tmp_path)
    assert shard.stat().st_size > 128 * 2**20
    cache, process = EmbeddingCache(tmp_path), psutil.Process()
    before = process.memory_info().rss
    kept = cache.read(prompts_of(128)[60:63])
    assert len(kept) == 3
    assert process.memory_info().rss - before < 24 * 2**20


# Keys


def test_every_input_of_an_embedding_names_its_cache() -> None:
    key = CacheKey(encoders="a", max_sequence_length=512, dtype="bfloat16")
    changes: list[dict[str, object]] = [
        {"encoders": "b"},
        {"encoders": {"id": "a/b", "revision": "c"}},
        {"max_sequence_length": 256},
        {"dtype": "float32"},
    ]
    names = {key.model_copy(update=change).name for change in changes} | {key.name}
    assert len(names) == len(changes) + 1
    assert key.model_copy().name == key.name


def test_the_fingerprint_is_of_the_encoders_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_folder, "_text_hash", policy_folder._text_hash.__wrapped__)
    folder = build_tiny_flux(tmp_path / "pipeline")

    def fingerprint() -> object:
        return text_fingerprint(str(folder), None)

    first = fingerprint()
    assert first == text_fingerprint(str(shutil.copytree(folder, tmp_path / "copy")), "ignored")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert fingerprint() == first
    seen = {first}
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        part = max((folder / name).iterdir(), key=lambda path: path.stat().st_size)
        part.write_bytes(part.read_bytes() + b"\0")
        seen.add(fingerprint())
    assert len(seen) == 5


def test_a_hub_id_is_named_by_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    assert text_fingerprint("nobody/no-such-flux", None) is None
    assert text_fingerprint("nobody/no-such-flux", "main") is None
    assert text_fingerprint("nobody/no-such-flux", commit) == {
        "id": "nobody/no-such-flux", "revision": commit,
    }  # fmt: skip
    # A cached branch means the commit that its snapshot has.
    found = tmp_path / "snapshots" / commit / "model_index.json"
    monkeypatch.setattr(policy_folder, "try_to_load_from_cache", lambda *_, **__: str(found))
    assert text_fingerprint("nobody/no-such-flux", "main") == {
        "id": "nobody/no-such-flux", "revision": commit,
    }  # fmt: skip


# Interruption


def start(folder: Path, count: int, seconds: float) -> "subprocess.Popen[str]":
    arguments = [str(folder), str(count), str(seconds)]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.Popen(
        [sys.executable, "-m", "fake_encoder", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_and_resumed_leaves_the_same_files(tmp_path: Path) -> None:
    count = 22
    filled(tmp_path / "undisturbed", count)
    folder = tmp_path / "killed"
    process = start(folder, count, 0.03)
    deadline = time.monotonic() + 600
    while len(list(folder.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()

    cache = EmbeddingCache(folder)
    survived = len(cache)
    assert survived >= 12 and survived % 4 == 0 and survived < count
    recorder = Recorder()
    assert fill(cache, prompts_of(count), recorder, settings()) == count - survived
    assert recorder.encoded == prompts_of(count)[survived:]
    assert_holds(cache, count)
    assert contents(folder) == contents(tmp_path / "undisturbed")


def test_a_shard_without_its_index_is_not_there(tmp_path: Path) -> None:
    filled(tmp_path)
    expected = contents(tmp_path)
    shards(tmp_path)[0].with_suffix(".json").unlink()
    cache = EmbeddingCache(tmp_path)
    assert len(cache) < 10
    fill(cache, prompts_of(10), Recorder(), settings())
    assert contents(tmp_path) == expected


def test_what_killed_writers_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    filled(tmp_path)
    expected = contents(tmp_path)
    left = [tmp_path / ".abc.safetensors.x1.tmp", tmp_path / "0123456789ab.safetensors"]
    for path in left:
        path.write_bytes(b"half")
    filled(tmp_path)
    assert all(path.exists() for path in left)  # a live writer's, for all one knows
    for path in left:
        os.utime(path, (0, 0))
    filled(tmp_path)
    assert contents(tmp_path) == expected


def test_of_two_writers_one_waits_and_has_nothing_to_do(tmp_path: Path) -> None:
    count, folder = 30, tmp_path / "cache"
    processes = [start(folder, count, 0.01) for _ in range(2)]
    encoded = []
    for process in processes:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        encoded.append(int(output))
    assert sorted(encoded) == [0, count]
    assert_holds(EmbeddingCache(folder), count)


def test_a_writer_says_that_it_waits_for_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Recorder(), Recorder()
    other = threading.Thread(
        target=lambda: fill(EmbeddingCache(tmp_path), prompts_of(10), second, settings())
    )

    def after(done: int) -> None:
        if done == 1:
            other.start()
        deadline = time.monotonic() + 600
        while not caplog.records and time.monotonic() < deadline:  # until the second waits
            time.sleep(0.005)

    first.after = after
    with caplog.at_level(logging.WARNING, logger="g2rpo"):
        fill(EmbeddingCache(tmp_path), prompts_of(10), first, settings())
        other.join(timeout=600)
    assert not other.is_alive()
    assert (len(first.encoded), second.loads) == (10, 0)
    assert [r.getMessage().split(": ")[1] for r in caplog.records] == [
        "waiting for another process that encodes the same prompts"
    ]


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda shard: shard.write_bytes(shard.read_bytes()[:-10]),
    "emptied": lambda shard: shard.write_bytes(b""),
    "a flipped bit": flip,
    "another file": lambda shard: shard.write_bytes(bytes(shard.stat().st_size)),
    "gone": lambda shard: shard.unlink(),
    "its index": lambda shard: shard.with_suffix(".json").write_text("{"),
    "index of another": lambda shard: shutil.copy(
        next(p for p in shards(shard.parent) if p != shard).with_suffix(".json"),
        shard.with_suffix(".json"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_told_and_encoded_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, 12)
    expected = contents(tmp_path)
    DAMAGES[damage](shards(tmp_path)[1])
    recorder = Recorder()
    cache = EmbeddingCache(tmp_path)
    with caplog.at_level(logging.WARNING, logger="g2rpo"):
        fill(cache, prompts_of(12), recorder, settings())
    assert len(recorder.encoded) == 4
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert shards(tmp_path)[1].name in message and "\n" not in message
    assert_holds(cache, 12)
    assert contents(tmp_path) == expected


def test_damage_is_found_when_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path, 4)
    cache = EmbeddingCache(tmp_path)
    flip(shards(tmp_path)[0])  # one prompt's number, behind the reader's back
    whole = frozenset(map(prompt_key, prompts_of(4)))
    with hashing_up_to(0):  # as a listing looks at large shards
        assert cache.holds(whole)
    with caplog.at_level(logging.WARNING, logger="g2rpo"):
        found = [cache.read([prompt]) for prompt in prompts_of(4) * 2]
    assert sum(map(len, found)) == 3 or not all(found)
    assert len(caplog.records) == 1
    # So that the stage before is run again.
    assert not cache.holds(whole)
    assert not EmbeddingCache(tmp_path).holds(whole)


def test_damage_in_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, 4)
    flip(shards(tmp_path)[0])
    cache = EmbeddingCache(tmp_path)

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with caplog.at_level(logging.WARNING, logger="g2rpo"):
        for _ in range(3):
            assert not all(cache.read([prompt]) for prompt in prompts_of(4))
    assert len(caplog.records) == 1


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def wide_rows(prompt: str) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": torch.full((8192,), float(len(prompt)))}


def test_a_disk_that_is_too_small_is_told_before_anything_is_loaded(small_disk: Path) -> None:
    recorder = Recorder()
    with pytest.raises(UserError, match=r"disk is full .*GB needed.* free some space") as caught:
        fill(EmbeddingCache(small_disk), prompts_of(100), recorder, FillSettings(32768))
    assert "\n" not in str(caught.value)
    assert recorder.loads == 0


def test_a_disk_that_fills_up_keeps_the_shards_before(small_disk: Path) -> None:
    plan = FillSettings(32768, shard_prompts=4)
    prompts = prompts_of(20)
    count = 0

    def encoder(prompt: str) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        if count == 11:  # another's file takes what the check before had found free
            (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 40000))
        return wide_rows(prompt)

    with pytest.raises(UserError, match="disk is full") as caught:
        fill(EmbeddingCache(small_disk), prompts, lambda _: encoder, plan)
    assert "\n" not in str(caught.value)
    cache = EmbeddingCache(small_disk)
    assert cache.missing(prompts) == prompts[8:]
    assert cache.read(prompts).keys() == set(prompts[:8])
    assert not list(small_disk.glob(".*.tmp"))

    (small_disk / "other").unlink()
    assert fill(cache, prompts, lambda _: wide_rows, plan) == 12
    assert cache.missing(prompts) == []
