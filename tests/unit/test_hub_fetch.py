"""Fetching from a hub on loopback and from folders: resuming, refusing, never half a file."""

import errno
import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, serve, use_empty_caches

from g2rpo.errors import UserError
from g2rpo.hub import cache
from g2rpo.hub import fetch as fetching
from g2rpo.hub.catalogue import Artifact, PublishedFile
from g2rpo.hub.fetch import FetchOptions, fetch
from g2rpo.hub.lock import Lock

REPO = "owner/model"
CONTENT = random.Random(0).randbytes(700_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    use_empty_caches(monkeypatch, tmp_path)
    with serve() as running:
        running.add(REPO, "deep/model.bin", CONTENT)
        yield running


def artifact(
    *, size: int | None = None, sha256: str | None = None, gated: bool = False, kind: str = "model"
) -> Artifact:
    file = PublishedFile(path="deep/model.bin", size=size, sha256=sha256)
    return Artifact.model_validate(
        {
            "name": "tiny",
            "kind": kind,
            "repo": REPO,
            "files": (file,),
            "gated": gated,
            "page": "https://huggingface.co/owner/model",
            "purpose": "reward",
        }
    )


def get(what: Artifact, mirror: str | Path, *, offline: bool = False) -> Path:
    return fetch(what, Lock(), FetchOptions(str(mirror), offline))[0]


def leftovers(tmp_path: Path) -> list[str]:
    """Files that a loader could take for whole."""
    return [str(p) for p in (tmp_path / "hf").rglob("model.bin")]


def parts(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.rglob("*.part"))


def test_a_fetched_file_is_where_the_hub_library_looks(hub: FakeHub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download

    path = get(artifact(size=len(CONTENT), sha256=SHA256), hub.address)
    assert path.read_bytes() == CONTENT
    assert hf_hub_download(REPO, "deep/model.bin", local_files_only=True) == str(path)
    pinned = hf_hub_download(REPO, "deep/model.bin", revision=COMMIT, local_files_only=True)
    assert pinned == str(path)
    assert Path(snapshot_download(REPO, local_files_only=True)) == path.parents[1]
    assert parts(tmp_path) == []


def test_what_is_cached_is_not_fetched_again(hub: FakeHub) -> None:
    get(artifact(), hub.address)
    sent = hub.sent()
    told: list[str] = []
    fetch(artifact(), Lock(), FetchOptions(hub.address, tell=told.append))
    assert hub.sent() == sent == len(CONTENT)
    assert told == ["tiny: deep/model.bin: cached"]


def test_a_cut_connection_is_gone_on_with(hub: FakeHub) -> None:
    hub.cut_after = [200_000, 300_000]
    assert get(artifact(), hub.address).read_bytes() == CONTENT
    ranges = [request.range for request in hub.downloads()]
    assert ranges == [None, "bytes=200000-", "bytes=500000-"]
    assert hub.sent() == len(CONTENT)


def test_a_large_download_shows_how_far_it_is(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    get(artifact(), hub.address)
    assert capsys.readouterr().err == ""
    hub.add(REPO, "deep/model.bin", CONTENT * 4, "e" * 40)
    monkeypatch.setattr("g2rpo.hub.download.SHOWN", 2_000_000)
    fetch(artifact(), Lock(), FetchOptions(hub.address, newest=True))
    assert "tiny: deep/model.bin, MB: 2/2" in capsys.readouterr().err


def test_a_connection_cut_for_good_keeps_its_bytes_for_the_next_time(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut_after = [400_000] + [0] * 6
    with pytest.raises(UserError, match=r"deep/model\.bin.*cut after 400000 of 700000.*go on"):
        get(artifact(), hub.address)
    assert leftovers(tmp_path) == []
    assert [part.stat().st_size for part in parts(tmp_path)] == [400_000]
    hub.log.clear()
    assert get(artifact(), hub.address).read_bytes() == CONTENT
    assert [request.range for request in hub.downloads()] == ["bytes=400000-"]
    assert hub.sent() == 300_000


@pytest.mark.parametrize("small", [False, True])
def test_altered_content_is_refused_by_name_without_any_known_hash(
    hub: FakeHub, tmp_path: Path, small: bool
) -> None:
    name = f"{REPO}/deep/model.bin"
    if small:
        hub.small.add(name)
    hub.sends[name] = CONTENT[:-1] + b"!"
    with pytest.raises(UserError, match=r"tiny: deep/model\.bin is altered.*fetch it again"):
        get(artifact(), hub.address)
    assert leftovers(tmp_path) == []
    assert parts(tmp_path) == []
    del hub.sends[name]
    assert get(artifact(), hub.address).read_bytes() == CONTENT


def test_other_content_than_the_stated_hash_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"deep/model\.bin is altered.*000000000000… is expected"):
        get(artifact(sha256="0" * 64), hub.address)
    assert leftovers(tmp_path) == []


def test_a_truncated_file_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(REPO, "deep/model.bin", CONTENT[:1000])
    with pytest.raises(UserError, match=r"model\.bin is truncated on the server.*1000 bytes"):
        get(artifact(size=len(CONTENT), sha256=SHA256), hub.address)
    assert leftovers(tmp_path) == []


def test_a_server_that_ends_early_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    """It announces the whole size, but sends a shorter file."""
    hub.sends[f"{REPO}/deep/model.bin"] = CONTENT[:1000]
    with pytest.raises(UserError, match=r"of 700000 bytes \(the server ends too early\)"):
        get(artifact(), hub.address)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_names_the_page_and_how_to_log_in(hub: FakeHub, status: int) -> None:
    hub.gated[REPO] = status
    with pytest.raises(UserError) as error:
        get(artifact(gated=True), hub.address)
    message = str(error.value)
    assert "gated" in message
    assert "https://huggingface.co/owner/model" in message
    assert "hf auth login" in message
    assert "\n" not in message


def test_the_token_is_not_sent_to_a_mirror(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    get(artifact(), hub.address)
    assert {request.authorization for request in hub.log} == {None}


def test_the_hub_itself_gets_the_token_and_no_message_has_it(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    told: list[str] = []
    fetch(artifact(), Lock(), FetchOptions(tell=told.append))
    assert {request.authorization for request in hub.log} == {"Bearer hf_secret"}
    hub.gated[REPO] = 403
    with pytest.raises(UserError) as error:
        fetch(artifact(sha256="0" * 64, gated=True), Lock(), FetchOptions(tell=told.append))
    assert "hf_secret" not in " ".join([*told, str(error.value)])


def test_content_on_another_host_is_resumed_there_without_the_token(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with serve() as storage:
        storage.add(REPO, "deep/model.bin", CONTENT)
        storage.cut_after = [100_000]
        hub.redirect = storage.address
        assert fetch(artifact(), Lock(), FetchOptions())[0].read_bytes() == CONTENT
        assert [request.range for request in storage.log] == [None, "bytes=100000-"]
        assert {request.authorization for request in storage.log} == {None}
        assert {request.authorization for request in hub.log} == {"Bearer hf_secret"}
        # A signed address runs out: every connection asks the hub for a new one.
        assert len(hub.downloads()) == 2


def test_an_unknown_file_repository_and_server_are_told(hub: FakeHub) -> None:
    hub.files.clear()
    with pytest.raises(UserError, match=r"deep/model\.bin of owner/model: .* no such file \(404\)"):
        get(artifact(), hub.address)
    hub.commits.clear()
    with pytest.raises(UserError, match=r"refuses it or has no such repository"):
        get(artifact(), hub.address)
    with pytest.raises(UserError, match=r"cannot be reached.*check the network"):
        get(artifact(), "http://127.0.0.1:9")


def test_offline_never_asks_the_server(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"not in the cache and --offline"):
        get(artifact(), hub.address, offline=True)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"not in the cache and offline mode is on"):
        get(artifact(), hub.address)
    assert hub.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    get(artifact(), hub.address)
    hub.log.clear()
    get(artifact(), hub.address, offline=True)
    assert hub.log == []


def test_a_full_disk_is_told_before_and_during_a_download(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(".")
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(UserError, match=r"model\.bin: the disk of .* is full .*free some"):
            get(artifact(), hub.address)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("g2rpo.hub.download._receive", no_space)
    with pytest.raises(UserError, match=r"model\.bin: the disk of .* is full .*No space left"):
        get(artifact(), hub.address)


def test_an_altered_cached_file_is_fetched_again(hub: FakeHub) -> None:
    what = artifact(sha256=SHA256)
    path = get(what, hub.address)
    path.resolve().write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(UserError, match=r"is altered.*fetch it again where there is a network"):
        get(what, hub.address, offline=True)
    assert get(what, hub.address).read_bytes() == CONTENT


# --- a folder as mirror ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, hub: FakeHub) -> Path:
    file = tmp_path / "mirror" / REPO / "deep" / "model.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    return tmp_path / "mirror"


def test_a_folder_fills_the_same_cache_without_a_network(
    hub: FakeHub, folder: Path, tmp_path: Path
) -> None:
    from huggingface_hub import hf_hub_download

    path = get(artifact(size=len(CONTENT), sha256=SHA256), folder, offline=True)
    assert path.read_bytes() == CONTENT
    assert hf_hub_download(REPO, "deep/model.bin", local_files_only=True) == str(path)
    assert hub.log == []
    assert parts(tmp_path) == []


def test_a_folder_with_a_pinned_commit_fills_that_commit(folder: Path) -> None:
    pinned = artifact().model_copy(update={"revision": COMMIT})
    assert COMMIT in get(pinned, folder).parts


def test_a_copy_that_was_cut_is_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fetching._copy
    read: list[int] = []

    def cut(source: Path, part: Path, label: str) -> None:
        part.write_bytes(source.read_bytes()[:300_000])
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_copy", cut)
        with pytest.raises(UserError, match="Input/output error"):
            get(artifact(), folder)
    assert leftovers(tmp_path) == []

    def counting(source: Path, part: Path, label: str) -> None:
        read.append(part.stat().st_size)
        whole(source, part, label)

    monkeypatch.setattr(fetching, "_copy", counting)
    assert get(artifact(), folder).read_bytes() == CONTENT
    assert read == [300_000]


def test_what_is_wrong_in_a_folder_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    file = folder / REPO / "deep" / "model.bin"
    what = artifact(size=len(CONTENT), sha256=SHA256)
    file.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(UserError, match=r"deep/model\.bin is altered.*replace .*model\.bin"):
        get(what, folder)
    file.write_bytes(CONTENT[:5])
    with pytest.raises(UserError, match=r"deep/model\.bin is truncated: 5 of 700000"):
        get(what, folder)
    file.unlink()
    with pytest.raises(UserError, match=r"deep/model\.bin: the mirror has no "):
        get(what, folder)
    with pytest.raises(UserError, match=r"no such folder"):
        get(what, tmp_path / "absent")
    assert leftovers(tmp_path) == []


# --- raw files of GitHub --------------------------------------------------------------------------


def test_raw_files_go_into_our_own_cache_and_are_resumed(hub: FakeHub, tmp_path: Path) -> None:
    what = artifact(kind="github", size=len(CONTENT), sha256=SHA256)
    hub.cut_after = [100_000]
    path = get(what, hub.address)
    assert path == cache.own_cache() / "github" / "owner--model" / "HEAD" / "deep" / "model.bin"
    assert path.read_bytes() == CONTENT
    assert [request.range for request in hub.downloads()] == [None, "bytes=100000-"]


def test_raw_files_are_refused_like_others(hub: FakeHub) -> None:
    what = artifact(kind="github", sha256="0" * 64)
    with pytest.raises(UserError, match=r"deep/model\.bin is altered"):
        get(what, hub.address)
    hub.files.clear()
    with pytest.raises(UserError, match=r"no such file \(404\)"):
        get(what, hub.address)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 cannot be reached"):
        get(what, "http://127.0.0.1:9")
