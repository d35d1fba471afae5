"""`g2rpo weights` as it is typed: exit codes, and errors in one line."""

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, serve, use_empty_caches

from reproduce import cli

HPS = "HPS_v2.1_compressed.pt"
CONTENT = random.Random(1).randbytes(600_000)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    use_empty_caches(monkeypatch, tmp_path)
    monkeypatch.setattr("g2rpo.quiet.quiet_libraries", lambda: None)
    with serve() as running:
        running.add("xswu/HPSv2", HPS, CONTENT)
        yield running


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Run":
    return Run(monkeypatch, capsys)


class Run:
    """Calls the command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["g2rpo", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err


def test_the_weights_of_a_profile_are_those_that_it_needs(run: Run, hub: FakeHub) -> None:
    code, out, _ = run("weights", "list", "--profile", "sd35-lora")
    names = {line.split()[0] for line in out.splitlines()}
    assert code == 0 and {"sd35-medium", "hps-v2.1", "pick-score"} <= names
    assert not any(name == "flux-dev" or name.endswith("-released") for name in names)
    assert "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium" in out


def test_list_fetch_lock_verify_and_fix(run: Run, hub: FakeHub) -> None:
    code, out, _ = run("weights", "list", "--profile", "flux-lora")
    assert code == 0
    assert "FLUX.1 [dev] Non-Commercial License" in out
    assert "https://huggingface.co/black-forest-labs/FLUX.1-dev" in out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert {"flux-dev", "hps-v2.1", "clip-dfn5b-224", "image-reward-tokenizer"} <= lines.keys()
    assert "hps-v2.0" not in lines
    assert "missing" in lines["hps-v2.1"]

    fetching = ("weights", "fetch", "hps-v2.1", "--mirror", hub.address)
    code, out, err = run(*fetching)
    assert (code, out) == (0, "hps-v2.1: ready\n")
    assert "fetched, SHA-256" in err
    assert "cached" in run("weights", "list")[1]
    assert "not locked" in run("weights", "verify")[1]

    code, out, _ = run("weights", "lock")
    assert code == 0
    assert "2 changes" in out
    code, out, _ = run("weights", "verify", "hps-v2.1")
    assert (code, out) == (0, f"hps-v2.1  {HPS}  ok\n")

    blob = next(p for p in Path(os.environ["G2RPO_CACHE"]).parent.rglob("blobs/*"))
    blob.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    code, out, err = run("weights", "verify")
    assert code == 2
    assert f"{HPS}  altered" in out
    assert err.startswith("error: missing or altered files in hps-v2.1; run `g2rpo weights fetch")
    code, _, err = run("weights", "lock")
    assert code == 2
    assert "not locked: fetch it again" in err
    assert run(*fetching)[0] == 0
    assert run("weights", "verify")[0] == 0


def test_mistakes_are_one_line_and_exit_code_2(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.gated["black-forest-labs/FLUX.1-dev"] = 401
    for arguments, said in [
        (("fetch",), "nothing to fetch; give names"),
        (("fetch", "hps-v2.1", "--profile", "flux"), "not both"),
        (("fetch", "hps"), "unknown artifact 'hps'"),
        (("fetch", "flux-dev", "--mirror", hub.address), "hf auth login"),
        (("fetch", "hps-v2.1", "--mirror", str(tmp_path / "none")), "no such folder"),
        (("fetch", "hps-v2.1", "--mirror", "http://127.0.0.1:9"), "cannot reach"),
        (("fetch", "hps-v2.1", "--offline"), "--offline"),
        (("verify", "hps-v2.1"), "missing or altered files in hps-v2.1"),
    ]:
        code, _, err = run("weights", *arguments)
        assert code == 2, arguments
        last = err.splitlines()[-1]
        assert last.startswith("error: ") and said in last, (arguments, err)
        assert "Traceback" not in err


def test_one_refusal_does_not_keep_the_others_away(run: Run, hub: FakeHub) -> None:
    hub.gated["black-forest-labs/FLUX.1-dev"] = 403
    code, out, err = run("weights", "fetch", "flux-dev", "hps-v2.1", "--mirror", hub.address)
    assert code == 2
    assert out == "hps-v2.1: ready\n"
    assert "https://huggingface.co/black-forest-labs/FLUX.1-dev" in err
    assert err.splitlines()[-1].startswith("error: 1 of 2 artifacts were not fetched: flux-dev;")


def test_a_lock_that_differs_needs_update(run: Run, hub: FakeHub) -> None:
    fetching = ("weights", "fetch", "hps-v2.1", "--mirror", hub.address)
    assert run(*fetching)[0] == run("weights", "lock")[0] == 0
    lock = Path(os.environ["G2RPO_WEIGHTS_LOCK"])
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    lock.write_text(lock.read_text().replace(sha256, "0" * 64))
    before = lock.read_bytes()
    code, out, err = run("weights", "lock")
    assert code == 2
    assert f"{HPS}: 000000000000… -> {sha256[:12]}…" in out
    assert "differs from the locked file" in err and "--update" in err
    assert lock.read_bytes() == before
    assert run("weights", "verify")[0] == 2
    assert run("weights", "lock", "--update")[0] == 0
    assert run("weights", "verify")[0] == 0


def test_a_profile_needs_the_variants_that_it_names(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "name: mine\nextends: flux\npolicy: {source: /weights/flux}\nrewards:\n"
        "  clip: {model: clip, variant: '378'}\n  hps: {model: hps, source: /weights/hps}\n"
    )
    code, out, _ = run("weights", "list", "--profile", str(profile))
    assert code == 0
    names = {line.split()[0] for line in out.splitlines()[1:]}
    assert "clip-dfn5b-378" in names
    assert not names & {"clip-dfn5b-224", "flux-dev", "hps-v2.1", "hps-v2.0"}


def test_a_profile_of_local_models_needs_nothing(run: Run, hub: FakeHub) -> None:
    code, _, err = run("weights", "fetch", "--profile", "mini", "--offline")
    assert (code, err) == (0, "profile mini needs no published weights\n")
