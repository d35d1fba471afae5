"""The embedding cache: what is written is what is read, whatever happens to process and disk."""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import SafetensorError, safe_open
from tiny_flux import build_tiny_flux

from g2rpo.checksums import hashing_up_to
from g2rpo.data import embeddings
from g2rpo.data.embeddings import CacheKey, EmbeddingCache, Rows, fill, prompts_per_shard
from g2rpo.errors import UserError
from g2rpo.policy import folder as policy_folder
from g2rpo.policy.folder import text_fingerprint
from g2rpo.seeds import gaussian

PROMPT_BYTES = (5 * 8 + 6) * 2


def prompts_of(count: int) -> list[str]:
    return [f"prompt number {index}" for index in range(count)]


def encode(prompt: str) -> Rows:
    return {
        "prompt_embeds": gaussian((5, 8), 1, "sequence", prompt).bfloat16(),
        "pooled_prompt_embeds": gaussian((6,), 1, "pooled", prompt).bfloat16(),
    }


class Recorder:
    """Loads an encoder that costs nothing, and remembers what it encoded."""

    def __init__(self, after: Callable[[int], None] = lambda _: None) -> None:
        self.encoded: list[str] = []
        self.loads = 0
        self.after = after

    def __call__(self, prompts: Sequence[str]) -> Callable[[str], Rows]:
        self.loads += 1
        return self._encode

    def _encode(self, prompt: str) -> Rows:
        self.encoded.append(prompt)
        self.after(len(self.encoded))
        return encode(prompt)


def filled(folder: Path, count: int = 10) -> EmbeddingCache:
    cache = EmbeddingCache(folder)
    fill(cache, prompts_of(count), Recorder(), PROMPT_BYTES, 4)
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
    assert fill(EmbeddingCache(tmp_path), prompts_of(10) * 2, same, PROMPT_BYTES, 4) == 0
    assert same.loads == 0
    assert contents(tmp_path) == before

    other = ["something new", *prompts_of(4), "something else", "something new"]
    added = Recorder()
    cache = EmbeddingCache(tmp_path)
    assert fill(cache, other, added, PROMPT_BYTES, 4) == 2
    assert added.encoded == ["something new", "something else"]
    assert before.items() <= contents(tmp_path).items()
    assert cache.read(other).keys() == set(other)


def test_a_reader_sees_what_another_adds_and_takes_away(tmp_path: Path) -> None:
    reader = EmbeddingCache(tmp_path / "cache")
    assert not reader.holds(prompts_of(10))
    filled(tmp_path / "cache")
    assert reader.holds(prompts_of(10)) and reader.holds(prompts_of(10))
    shutil.rmtree(tmp_path / "cache")
    assert not reader.holds(prompts_of(10))
    assert reader.read(prompts_of(10)) == {}


def test_a_shard_holds_as_many_prompts_as_fit() -> None:
    flux = (512 * 4096 + 768) * 2
    assert [prompts_per_shard(size) for size in (flux, 2 * flux, 10, 2**40)] == [64, 32, 1024, 1]


def test_reading_takes_the_memory_of_what_is_read(tmp_path: Path) -> None:
    row = {"prompt_embeds": torch.ones(2**18)}
    fill(EmbeddingCache(tmp_path), prompts_of(48), lambda _: lambda _: row, 2**20)
    (shard,) = shards(tmp_path)
    assert shard.stat().st_size > 48 * 2**20
    cache, process = EmbeddingCache(tmp_path), psutil.Process()
    before = process.memory_info().rss
    kept = cache.read(prompts_of(48)[20:23])
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


def test_an_interrupted_fill_resumes_and_leaves_identical_files(tmp_path: Path) -> None:
    count = 22
    filled(tmp_path / "undisturbed", count)
    folder = tmp_path / "killed"

    def kill(done: int) -> None:
        if done == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(EmbeddingCache(folder), prompts_of(count), Recorder(kill), PROMPT_BYTES, 4)
    cache = EmbeddingCache(folder)
    assert len(cache) == 12  # whole shards
    recorder = Recorder()
    assert fill(cache, prompts_of(count), recorder, PROMPT_BYTES, 4) == count - 12
    assert recorder.encoded == prompts_of(count)[12:]
    assert_holds(cache, count)
    assert contents(folder) == contents(tmp_path / "undisturbed")


def test_what_killed_writers_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    filled(tmp_path)
    expected = contents(tmp_path)
    left = tmp_path / ".abc.safetensors.x1.tmp"
    left.write_bytes(b"half")
    filled(tmp_path)
    assert left.exists()  # it may belong to a live process
    os.utime(left, (0, 0))
    filled(tmp_path)
    assert contents(tmp_path) == expected


def test_a_writer_says_that_it_waits_for_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Recorder(), Recorder()
    other = threading.Thread(
        target=lambda: fill(EmbeddingCache(tmp_path), prompts_of(10), second, PROMPT_BYTES, 4)
    )

    def after(done: int) -> None:
        if done == 1:
            other.start()
        deadline = time.monotonic() + 600
        while not caplog.records and time.monotonic() < deadline:  # until the second waits
            time.sleep(0.005)

    first.after = after
    with caplog.at_level(logging.WARNING, logger="g2rpo"):
        fill(EmbeddingCache(tmp_path), prompts_of(10), first, PROMPT_BYTES, 4)
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
    "other prompts": lambda shard: shutil.copy(
        next(path for path in shards(shard.parent) if path != shard), shard
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_encoded_again_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, 12)
    expected = contents(tmp_path)
    DAMAGES[damage](shards(tmp_path)[1])
    recorder = Recorder()
    cache = EmbeddingCache(tmp_path)
    with caplog.at_level(logging.WARNING, logger="g2rpo"):
        fill(cache, prompts_of(12), recorder, PROMPT_BYTES, 4)
    assert len(recorder.encoded) == 4
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert shards(tmp_path)[1].name in message and "\n" not in message
    assert_holds(cache, 12)
    assert contents(tmp_path) == expected


def test_a_shard_that_was_written_again_is_kept(tmp_path: Path) -> None:
    cache = filled(tmp_path, 8)
    shards(tmp_path)[0].write_bytes(b"")
    fill(cache, prompts_of(8), Recorder(), PROMPT_BYTES, 4)
    recorder = Recorder()
    fill(cache, prompts_of(9), recorder, PROMPT_BYTES, 4)
    assert recorder.encoded == prompts_of(9)[8:]
    assert_holds(cache, 9)


def test_damage_is_found_when_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path, 4)
    cache = EmbeddingCache(tmp_path)
    flip(shards(tmp_path)[0])  # one prompt's number, behind the reader's back
    with hashing_up_to(0):  # as listings treat large shards
        assert cache.holds(prompts_of(4))
    with caplog.at_level(logging.WARNING, logger="g2rpo"):
        found = [cache.read([prompt]) for prompt in prompts_of(4) * 2]
    assert sum(map(len, found)) == 3 or not all(found)
    assert len(caplog.records) == 1
    # So that the embedding stage is run again.
    assert not cache.holds(prompts_of(4))
    assert not EmbeddingCache(tmp_path).holds(prompts_of(4))


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


def test_a_disk_that_is_too_small_is_reported_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    recorder = Recorder()
    with pytest.raises(UserError, match=r"disk is full .*GB needed.* free some space") as caught:
        fill(EmbeddingCache(tmp_path), prompts_of(100), recorder, 32768)
    assert "\n" not in str(caught.value)
    assert recorder.loads == 0


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O (os error 28)")],
)
def test_a_disk_that_fills_up_keeps_the_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save = embeddings.save_file

    def save_two(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if len(shards(tmp_path)) == 2:
            raise error
        save(tensors, path, metadata)

    cache = EmbeddingCache(tmp_path)
    monkeypatch.setattr(embeddings, "save_file", save_two)
    with pytest.raises(UserError, match="disk is full") as caught:
        fill(cache, prompts_of(20), Recorder(), PROMPT_BYTES, 4)
    assert "\n" not in str(caught.value)
    assert EmbeddingCache(tmp_path).missing(prompts_of(20)) == prompts_of(20)[8:]
    assert not list(tmp_path.glob(".*.tmp"))
    monkeypatch.undo()
    assert fill(cache, prompts_of(20), Recorder(), PROMPT_BYTES, 4) == 12
    assert_holds(cache, 20)
