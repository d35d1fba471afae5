"""The catalogue, the lock file, the state of what is cached, and loading what is locked."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, serve, use_empty_caches

from g2rpo.errors import UserError
from g2rpo.hub.cache import Digests
from g2rpo.hub.catalogue import Artifact, PublishedFile, catalogue
from g2rpo.hub.fetch import FetchOptions, fetch
from g2rpo.hub.lock import Lock, expected, lock_path, read_lock, revision_of, write_lock
from g2rpo.hub.status import artifact_state, file_state, lock_cached
from g2rpo.rewards import aesthetic, clip_score, hps, hpsv3, image_reward, pick_score, vqa_score
from g2rpo.rewards.weights import locate

OTHER = "d" * 40
HPS = "HPS_v2.1_compressed.pt"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    use_empty_caches(monkeypatch, tmp_path)
    with serve() as running:
        running.add("xswu/HPSv2", HPS, b"weights of v2.1")
        running.add("xswu/HPSv2", "HPS_v2_compressed.pt", b"weights of v2.0")
        yield running


def named(name: str) -> Artifact:
    return catalogue().select([name], ("policy", "reward", "checkpoint", "prompts"))[0]


def get(hub: FakeHub, name: str, lock: Lock | None = None, *, newest: bool = False) -> Path:
    options = FetchOptions(hub.address, newest=newest)
    return fetch(named(name), lock or Lock(), options)[0]


def locked(names: list[str], lock: Lock, *, update: bool = False) -> tuple[Lock, list[str]]:
    new = lock_cached([named(name) for name in names], lock, update=update)
    return new, [what for what, *_ in lock.changes(new)]


# --- catalogue -----------------------------------------------------------------------------------


def test_the_catalogue_has_what_the_rewards_load_by_default() -> None:
    files = {(a.repo, file.path) for a in catalogue().artifacts for file in a.files}
    needed = {(hps.PUBLISHED, name) for name in hps.CHECKPOINTS.values()}
    needed |= {(repo, "open_clip_pytorch_model.bin") for repo, _ in clip_score.PUBLISHED.values()}
    needed |= {(pick_score.PUBLISHED, name) for name in pick_score.TOKENIZER_FILES}
    needed |= {(pick_score.PUBLISHED, name) for name in ("config.json", "model.safetensors")}
    needed |= {
        (image_reward.PUBLISHED, "ImageReward.pt"),
        (image_reward.PUBLISHED, "med_config.json"),
    }
    needed |= {
        (image_reward.PUBLISHED_TOKENIZER, "tokenizer.json"),
        (hpsv3.PUBLISHED, hpsv3.WEIGHTS),
        (hpsv3.PUBLISHED_BASE, "config.json"),
        (aesthetic.PUBLISHED_CLIP, "model.safetensors"),
        (vqa_score.PUBLISHED_MODEL, "config.json"),
    }
    for name in (hpsv3.QUESTION_ARTIFACT, aesthetic.HEAD_ARTIFACT):
        assert named(name).revision is not None and len(named(name).files) == 1
    assert needed <= files


def test_the_catalogue_states_the_source_of_every_revision_size_and_hash() -> None:
    artifacts = catalogue().artifacts
    assert len({artifact.name for artifact in artifacts}) == len(artifacts)
    for artifact in artifacts:
        stated = artifact.revision or any(f.size or f.sha256 for f in artifact.files)
        assert artifact.sources or not stated, artifact.name
        assert artifact.page.startswith("https://"), artifact.name
        assert artifact.size_note or artifact.approximate_size is None, artifact.name
    assert named("flux-dev").gated
    assert named("hpdv2-test").files[0].sha256 is not None


def test_an_unknown_artifact_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'hps-v2\.1'"):
        catalogue().select(["hps-v21"], ("reward",))


# --- lock ----------------------------------------------------------------------------------------


def test_locking_records_commit_hash_and_size(hub: FakeHub) -> None:
    get(hub, "hps-v2.1")
    lock, changes = locked(["hps-v2.1"], Lock())
    assert changes == [f"xswu/HPSv2 {HPS}", "xswu/HPSv2 revision"]
    want = expected(named("hps-v2.1"), named("hps-v2.1").files[0], lock)
    assert want.revision == COMMIT
    assert want.size == 15
    assert want.sha256 == hashlib.sha256(b"weights of v2.1").hexdigest()
    assert locked(["hps-v2.1"], lock) == (lock, [])
    write_lock(lock)
    assert read_lock() == lock
    first = lock_path().read_bytes()
    write_lock(Lock.model_validate(json.loads(first)))
    assert lock_path().read_bytes() == first


def test_a_differing_hash_needs_update(hub: FakeHub) -> None:
    get(hub, "hps-v2.1")
    lock, _ = locked(["hps-v2.1"], Lock())
    hub.add("xswu/HPSv2", HPS, b"published again", OTHER)
    get(hub, "hps-v2.1", lock, newest=True)
    same, changes = locked(["hps-v2.1"], lock)
    assert (same, changes) == (lock, [])  # the locked revision is still cached
    new, changes = locked(["hps-v2.1"], lock, update=True)
    assert changes == [f"xswu/HPSv2 {HPS}", "xswu/HPSv2 revision"]
    assert new.repository("xswu/HPSv2").revision == OTHER
    path = get(hub, "hps-v2.1", lock)
    path.resolve().write_bytes(b"something else!")
    with pytest.raises(UserError, match=r"HPS_v2\.1.* is altered.*not locked"):
        locked(["hps-v2.1"], lock)


def test_what_comes_from_a_folder_is_locked_without_a_commit(hub: FakeHub, tmp_path: Path) -> None:
    file = tmp_path / "mirror" / "xswu" / "HPSv2" / HPS
    file.parent.mkdir(parents=True)
    file.write_bytes(b"copied")
    fetch(named("hps-v2.1"), Lock(), FetchOptions(str(tmp_path / "mirror")))
    lock, changes = locked(["hps-v2.1"], Lock())
    assert changes == [f"xswu/HPSv2 {HPS}"]
    assert lock.repository("xswu/HPSv2").revision is None
    assert file_state(named("hps-v2.1"), named("hps-v2.1").files[0], lock, rehash=True).word == "ok"


@pytest.mark.parametrize("text", ["{", "[]", '{"repositories": {"a/b": {"revision": "main"}}}'])
def test_a_damaged_lock_file_is_reported(hub: FakeHub, text: str) -> None:
    lock_path().write_text(text)
    with pytest.raises(UserError, match=r"lock\.json"):
        read_lock()


# --- state ---------------------------------------------------------------------------------------


def test_one_flipped_byte_is_seen_by_reading_again_alone(hub: FakeHub) -> None:
    artifact = named("hps-v2.1")
    assert artifact_state(artifact, Lock()).word == "missing"
    path = get(hub, "hps-v2.1")
    assert artifact_state(artifact, Lock()).word == "cached"
    lock, _ = locked(["hps-v2.1"], Lock())
    assert artifact_state(artifact, lock).word == "locked"
    content = path.resolve()
    before = content.stat()
    content.write_bytes(b"weights of v2.2")
    os.utime(content, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert artifact_state(artifact, lock).word == "locked"  # size and time are as they were
    state = file_state(artifact, artifact.files[0], lock, rehash=True)
    assert state.word == "altered"
    assert "SHA-256" in state.detail
    assert artifact_state(artifact, lock).word == "altered"


def test_an_artifact_with_some_of_its_files_is_partly_there(hub: FakeHub) -> None:
    hub.add("google-bert/bert-base-uncased", "config.json", b"{}")
    with pytest.raises(UserError, match="404"):
        get(hub, "image-reward-tokenizer")
    assert artifact_state(named("image-reward-tokenizer"), Lock()).word == "partly"


def test_a_remembered_hash_is_forgotten_with_the_file_s_time_or_size(hub: FakeHub) -> None:
    path = get(hub, "hps-v2.1")
    digests = Digests()
    assert digests.known(path) == hashlib.sha256(b"weights of v2.1").hexdigest()
    os.utime(path.resolve(), ns=(1, 1))
    assert digests.known(path) is None
    digests.path.write_text("not JSON")
    assert digests.known(path) is None
    digests.measure(path)
    assert digests.known(path) is not None


# --- loading -------------------------------------------------------------------------------------


def test_a_reward_loads_the_locked_revision_and_refuses_what_is_not_it(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    path = get(hub, "hps-v2.1")
    lock, _ = locked(["hps-v2.1"], Lock())
    write_lock(lock)
    hub.add("xswu/HPSv2", HPS, b"published again", OTHER)
    newer = get(hub, "hps-v2.1", lock, newest=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert newer != path
    assert revision_of("xswu/HPSv2") == COMMIT
    assert locate("xswu/HPSv2", (HPS,)) == path
    assert locate("xswu/HPSv2", (HPS,), OTHER) == newer
    path.resolve().write_bytes(b"short")
    with pytest.raises(UserError, match=r"truncated: 5 of 15 bytes.*g2rpo weights fetch"):
        locate("xswu/HPSv2", (HPS,))
    path.resolve().write_bytes(b"weights of v2.2")
    with pytest.raises(UserError, match="altered"):
        locate("xswu/HPSv2", (HPS,))


def test_a_policy_copied_from_a_folder_is_found_by_its_id(
    hub: FakeHub, smoke_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from g2rpo.policy.folder import resolve_source

    source = smoke_assets / "policy"
    mirrored = tmp_path / "mirror" / "black-forest-labs" / "FLUX.1-dev"
    mirrored.parent.mkdir(parents=True)
    mirrored.symlink_to(source)
    paths = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    files = tuple(PublishedFile(path=path) for path in sorted(paths))
    policy = named("flux-dev").model_copy(update={"files": files})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the cache, and offline"):
        resolve_source(policy.repo, None)
    fetch(policy, Lock(), FetchOptions(str(tmp_path / "mirror"), offline=True))
    folder = resolve_source(policy.repo, None)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == (
        sorted(paths)
    )
    write_lock(lock_cached([policy], Lock(), update=False))
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace("1", "2"))
    with pytest.raises(UserError, match=r"FLUX.1-dev vae/config.json is altered.*weights fetch"):
        resolve_source(policy.repo, None)
