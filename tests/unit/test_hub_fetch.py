"""Fetching from a hub on loopback and from folders: checked, refused in one line, never half."""

import errno
import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, serve, use_empty_caches
from huggingface_hub import constants, hf_hub_download, snapshot_download

from g2rpo.errors import UserError
from g2rpo.hub import cache
from g2rpo.hub.catalogue import Artifact, PublishedFile
from g2rpo.hub.fetch import FetchOptions, fetch, fetch_first, fetch_snapshot
from g2rpo.hub.lock import Lock

REPO = "owner/model"
FILE = "deep/model.safetensors"
NAME = f"{REPO}/{FILE}"
CONTENT = random.Random(0).randbytes(700_000)
ALTERED = CONTENT[:-1] + b"!"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    use_empty_caches(monkeypatch, tmp_path)
    with serve() as running:
        running.add(REPO, FILE, CONTENT)
        yield running


@pytest.fixture
def as_the_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """Where huggingface_hub looks for the hub itself."""
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return hub


@pytest.fixture
def folder(tmp_path: Path, hub: FakeHub) -> Path:
    file = tmp_path / "mirror" / REPO / FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    return tmp_path / "mirror"


def artifact(*, kind: str = "model", revision: str | None = None, **stated: object) -> Artifact:
    return Artifact.model_validate(
        {
            "name": "tiny",
            "kind": kind,
            "repo": REPO,
            "revision": revision,
            "files": [PublishedFile.model_validate({"path": FILE, **stated})],
            "page": "https://huggingface.co/owner/model",
            "purpose": "reward",
        }
    )


def get(what: Artifact, mirror: str | Path, *, offline: bool = False) -> Path:
    return fetch(what, Lock(), FetchOptions(str(mirror), offline))[0]


def refused(call: Callable[[], object]) -> str:
    """The message of a refusal, after which no loader finds a file."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    found = [
        cache.find(artifact(kind=kind), artifact().files[0], None) for kind in ("model", "github")
    ]
    assert found == [None, None]
    return str(error.value)


def test_a_fetched_file_is_where_the_hub_library_looks(hub: FakeHub, tmp_path: Path) -> None:
    path = get(artifact(size=len(CONTENT), sha256=SHA256), hub.address)
    assert path.read_bytes() == CONTENT
    for revision in (None, COMMIT):
        found = hf_hub_download(REPO, FILE, revision=revision, local_files_only=True)
        assert found == str(path)
    assert Path(snapshot_download(REPO, local_files_only=True)) == path.parents[1]
    lines: list[str] = []
    fetch(artifact(), Lock(), FetchOptions(hub.address, report=lines.append))
    assert lines == ["tiny: deep/model.safetensors: cached"]
    assert hub.sent() == len(CONTENT)


@pytest.mark.parametrize("kind", ["model", "github"])
def test_a_connection_that_is_always_cut_leaves_nothing(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hub.cut_after = [400_000] + [0] * 9
    monkeypatch.setattr("time.sleep", lambda _: None)
    message = refused(lambda: get(artifact(kind=kind), hub.address))
    assert "tiny: deep/model.safetensors" in message
    assert "stopped responding" in message and "run the same command again" in message
    hub.cut_after = []
    assert get(artifact(kind=kind), hub.address).read_bytes() == CONTENT


def test_what_killed_downloads_left_is_deleted_when_it_is_old(hub: FakeHub) -> None:
    blobs = cache.repository_folder(artifact()) / "blobs"
    blobs.mkdir(parents=True)
    old, new = blobs / f"{SHA256}.0.incomplete", blobs / f"{SHA256}.1.incomplete"
    for part in (old, new):
        part.write_bytes(CONTENT[:10])
    os.utime(old, (1, 1))
    assert get(artifact(), hub.address).read_bytes() == CONTENT
    assert (old.exists(), new.exists()) == (False, True)  # another process may be writing the other


@pytest.mark.parametrize(
    ("kind", "stated", "small", "sent", "said"),
    [
        ("model", {}, False, ALTERED, "is altered"),
        ("model", {}, True, ALTERED, "is altered: its content does not match its blob name"),
        ("model", {"sha256": "0" * 64}, False, CONTENT, ", expected 000000000000…"),
        ("model", {"size": 900_000}, False, CONTENT, "is truncated: 700000 of 900000 bytes"),
        ("model", {"size": 900}, False, CONTENT, "is altered: 700000 bytes, expected 900"),
        ("model", {}, False, CONTENT[:1000], "should be of size 700000 but has size 1000"),
        ("dataset", {"sha256": "0" * 64}, False, CONTENT, "is altered"),
        ("github", {"sha256": SHA256}, False, ALTERED, "is altered"),
        ("github", {"size": 700_000}, False, CONTENT[:1000], "is truncated: 1000 of 700000"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,
)
def test_other_content_is_refused_and_deleted(
    hub: FakeHub, kind: str, stated: dict[str, object], small: bool, sent: bytes, said: str
) -> None:
    hub.sends[NAME] = sent
    if small:
        hub.small.add(NAME)
    message = refused(lambda: get(artifact(kind=kind, **stated), hub.address))
    assert message.startswith("tiny: deep/model.safetensors") and said in message
    hub.sends.clear()
    assert get(artifact(kind=kind), hub.address).read_bytes() == CONTENT


@pytest.mark.parametrize("bad", [ALTERED, CONTENT[:10], b""])
def test_an_altered_cached_file_is_fetched_again(hub: FakeHub, bad: bytes) -> None:
    what = artifact(sha256=SHA256)
    path = get(what, hub.address)
    path.resolve().write_bytes(bad)
    with pytest.raises(UserError, match=r"is altered.*fetch it again with network access"):
        get(what, hub.address, offline=True)
    assert get(what, hub.address).read_bytes() == CONTENT


def test_a_content_shared_between_repositories_is_replaced_where_it_lies(hub: FakeHub) -> None:
    """huggingface_hub lets blobs of several repositories link to one content, named otherwise."""
    path = get(artifact(), hub.address)
    blob, shared = path.resolve(), path.parents[4] / "blobs" / ("f" * 64)
    shared.parent.mkdir()
    blob.rename(shared)
    blob.symlink_to(shared)
    sent = hub.sent()
    assert get(artifact(), hub.address) == path
    assert hub.sent() == sent
    shared.write_bytes(ALTERED)
    assert get(artifact(), hub.address).read_bytes() == CONTENT


# --- who is asked, and what is said when it refuses ----------------------------------------------


def test_the_token_is_for_the_hub_alone(
    hub: FakeHub, as_the_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    cache.remove(get(artifact(), hub.address))
    assert {request.authorization for request in hub.log} == {None}
    hub.log.clear()
    with serve() as storage:  # the hub sends large files from another host
        storage.add(REPO, FILE, CONTENT)
        hub.redirect = storage.address
        assert fetch_artifact().read_bytes() == CONTENT
        assert {request.authorization for request in storage.log} == {None}
    assert {request.authorization for request in hub.log} == {"Bearer hf_secret"}
    hub.gated[REPO] = 403
    with pytest.raises(UserError, match=r"^((?!hf_secret).)*$"):
        fetch(artifact(), Lock(), FetchOptions(newest=True))


def fetch_artifact(revision: str | None = None) -> Path:
    return fetch(artifact(revision=revision), Lock(), FetchOptions())[0]


def load_file(revision: str | None = None) -> Path:
    return fetch_first(REPO, ("absent.bin", FILE), revision)


def load_snapshot(revision: str | None = None) -> Path:
    return fetch_snapshot(REPO, ["deep/*"], revision, "policy")


def ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    template = UNREACHABLE + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", UNREACHABLE)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.mark.parametrize("load", [fetch_artifact, load_snapshot])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("gated 401", ("gated", "https://huggingface.co/owner/model", "`hf auth login`")),
        ("gated 403", ("gated", "https://huggingface.co/owner/model", "`hf auth login`")),
        ("no repository", ("neither a local folder nor a repository", "correct the name")),
        ("no revision", ("no such revision", "https://huggingface.co/owner/model")),
        ("offline", ("not in the cache, and offline mode is on", "HF_HUB_OFFLINE")),
        ("unreachable", ("cannot reach", "check the network")),
        ("broken", ("returned an error", "500", "try again later")),
        ("full disk", ("disk of", "is full", "free some space")),
        ("no space", ("disk of", "is full ([Errno 28] No space left", "free some space")),
        ("read-only", ("Permission denied", "HF_HOME")),
    ],
)
def test_a_refusal_is_one_line_for_a_fetch_and_a_loader(
    as_the_hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[..., Path],
    fault: str,
    said: tuple[str, ...],
) -> None:
    hub = as_the_hub
    if fault.startswith("gated"):
        hub.gated[REPO] = int(fault.split()[1])
    elif fault == "no repository":
        hub.commits.clear()
    elif fault == "no revision":
        hub.absent.add(COMMIT)
    elif fault == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif fault == "unreachable":
        ask_nobody(monkeypatch)
    elif fault == "broken":
        hub.broken = True
        monkeypatch.setattr("time.sleep", lambda _: None)
    elif fault == "full disk":
        usage = shutil.disk_usage(".")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    elif fault in ("no space", "read-only"):

        def refuse(*_: object, **__: object) -> None:
            if fault == "no space":
                raise OSError(errno.ENOSPC, "No space left on device")
            raise PermissionError(errno.EACCES, "Permission denied", "/cache")

        monkeypatch.setattr("huggingface_hub.file_download.http_get", refuse)
    message = refused(lambda: load(COMMIT if fault == "no revision" else None))
    assert all(words in message for words in said), message


def test_a_loader_says_which_setting_and_which_command(
    as_the_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused(lambda: load_snapshot("v9"))
    assert message.startswith("policy source 'owner/model' at policy.revision 'v9': ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused(load_snapshot)
    assert "; run `hf download owner/model` with network access" in message
    assert message.endswith("or set `policy.source` to a folder with the model")
    message = refused(lambda: fetch_first("xswu/HPSv2", ("a.pt", "b.pt"), None))
    assert message.startswith("cannot fetch a.pt or b.pt of xswu/HPSv2: ")
    assert "run `g2rpo weights fetch xswu/HPSv2` or `hf download xswu/HPSv2`" in message


@pytest.mark.parametrize("kind", ["model", "dataset", "github"])
def test_a_server_without_the_file_and_one_that_is_none(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    what = artifact(kind=kind)
    hub.absent.add(COMMIT)
    pinned = refused(lambda: get(artifact(kind=kind, revision=COMMIT), hub.address))
    assert ("no such file (404)" if kind == "github" else "no such revision") in pinned
    hub.absent.clear()
    hub.files.clear()
    message = refused(lambda: get(what, hub.address))
    assert f"{hub.address} has no such file (404); see https://huggingface.co/owner" in message
    assert f"cannot reach {UNREACHABLE}" in refused(lambda: get(what, UNREACHABLE))
    assert "model.safetensors" in refused(lambda: get(what, "http://127.0.0.1:no-port"))
    assert "no such folder" in refused(lambda: get(what, "ftp://127.0.0.1"))


def test_a_server_that_is_no_model_hub(hub: FakeHub) -> None:
    hub.headers = False
    message = refused(lambda: get(artifact(), hub.address))
    assert f"{hub.address} is not a model hub" in message


@pytest.mark.parametrize("variable", [False, True])
def test_offline_never_asks_the_server(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, variable: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", variable)
    message = refused(lambda: get(artifact(), hub.address, offline=not variable))
    assert "not in the cache, and offline mode is on" in message and "--mirror" in message
    assert hub.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    path = get(artifact(), hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", variable)
    hub.log.clear()
    assert get(artifact(), hub.address, offline=not variable) == path
    assert hub.log == []


def test_the_newest_is_not_taken_from_the_cache_where_the_hub_does_not_answer(hub: FakeHub) -> None:
    get(artifact(), hub.address)
    with pytest.raises(UserError, match="cannot reach"):
        fetch(artifact(), Lock(), FetchOptions(UNREACHABLE, newest=True))


def test_a_loader_takes_the_first_file_that_there_is(as_the_hub: FakeHub) -> None:
    assert load_file().read_bytes() == CONTENT
    with pytest.raises(UserError, match=r"cannot fetch a.bin or b.bin of owner/model: .*\(404\)"):
        fetch_first(REPO, ("a.bin", "b.bin"), None)
    assert (load_snapshot() / FILE).read_bytes() == CONTENT


# --- a folder as mirror ---------------------------------------------------------------------------


def test_a_folder_fills_the_same_cache_without_a_network(hub: FakeHub, folder: Path) -> None:
    path = get(artifact(size=len(CONTENT), sha256=SHA256), folder, offline=True)
    assert path.read_bytes() == CONTENT
    assert hf_hub_download(REPO, FILE, local_files_only=True) == str(path)
    assert Path(snapshot_download(REPO, local_files_only=True)) == path.parents[1]
    assert COMMIT in get(artifact(revision=COMMIT), folder).parts
    raw = get(artifact(kind="github"), folder, offline=True)
    assert raw == cache.own_cache() / "github" / "owner--model" / "HEAD" / FILE
    assert raw.read_bytes() == CONTENT
    assert hub.log == []
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_what_is_wrong_in_a_folder_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    file = folder / REPO / FILE
    what = artifact(size=len(CONTENT), sha256=SHA256)
    for content, said in [(ALTERED, "is altered"), (CONTENT[:5], "is truncated: 5 of 700000")]:
        file.write_bytes(content)
        message = refused(lambda: get(what, folder))
        assert said in message and f"replace {file}" in message
    file.unlink()
    assert f"no such file in the mirror: {file}" in refused(lambda: get(what, folder))
    assert "no such folder" in refused(lambda: get(what, tmp_path / "absent"))
