"""`g2rpo check cluster` on a real cluster: what is right, and what is wrong, each with its line."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Cluster

from reproduce import cli
from slurm.checks import trial
from slurm.checks.cluster import check_cluster
from slurm.checks.finding import Case
from slurm.cluster import Cluster as ClusterProfile
from slurm.graph import Needs

pytestmark = pytest.mark.slurm
REPOSITORY = Path(__file__).resolve().parents[2]
GOOD = {
    "partition": "main",
    "gpus_per_node": 2,
    "cpus_per_task": 1,
    "memory_gb_per_task": 1,
    "signal_lead_seconds": 10,
}


@dataclass
class Examination:
    """What the command answered."""

    code: int
    lines: list[tuple[str, str]]
    verdict: str

    def line(self, what: str) -> tuple[str, str]:
        """The word and the whole text of the one line that begins so."""
        found = [(word, text) for word, text in self.lines if text.startswith(what)]
        assert len(found) == 1, (what, self.lines)
        return found[0]

    def words(self) -> set[str]:
        return {word for word, _ in self.lines}


class Check:
    """Runs the command; in this process, since importing everything takes seconds."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.results = folder / "results"

    def command(self, *arguments: str, **changes: Any) -> list[str]:
        """The words of the command on a profile that fits but for ``changes``."""
        profile = self.folder / "here.yaml"
        profile.write_text(yaml.safe_dump(GOOD | changes))
        where = ("--cluster", str(profile), "--results", str(self.results))
        return ["check", "cluster", *where, *arguments]

    def __call__(self, *arguments: str, **changes: Any) -> Examination:
        self.monkeypatch.setattr(sys, "argv", ["g2rpo", *self.command(*arguments, **changes)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = self.capsys.readouterr()
        return examination(code, captured.out, captured.err)

    def profile(self, **hardware: Any) -> str:
        """A scale like mini that takes GPUs."""
        path = self.folder / "scale.yaml"
        path.write_text(yaml.safe_dump({"name": "scale", "extends": "mini", "hardware": hardware}))
        return str(path)


def examination(code: int, out: str, error: str) -> Examination:
    """What the command printed, by line."""
    rows = (row.partition(" ") for row in out.splitlines())
    lines = [(word, text.strip()) for word, _, text in rows if word in ("ok", "warning", "failed")]
    assert lines, error
    return Examination(code, lines, out.strip().splitlines()[-1])


@pytest.fixture
def check(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Check:
    monkeypatch.setattr("g2rpo.quiet.quiet_libraries", lambda: None)
    return Check(tmp_path, monkeypatch, capsys)


def test_a_profile_that_fits_is_all_ok(check: Check, cluster: Cluster) -> None:
    done = check(cpu_partition="high", account="root", qos="normal")
    assert (done.code, done.words()) == (0, {"ok"}), done
    assert "visible here" in done.line(f"the folder {check.results}")[1]
    assert "g2rpo.training.loop" in done.line("Python on node")[1]
    assert "resolves" in done.line("names on node")[1]
    # Nothing is left: no job, no files.
    assert cluster.run("squeue", "--noheader") == ""
    assert not list(check.results.iterdir())


def test_two_nodes_with_gpus_that_torch_does_not_see(check: Check) -> None:
    # The cluster hands out GPUs that are none, and that is what is found on both nodes.
    done = check("--profile", check.profile(gpus=4))
    assert done.code == 2
    failed = [text.split("  ")[0] for word, text in done.lines if word == "failed"]
    assert sorted(failed) == ["GPUs on node1", "GPUs on node2"]
    assert done.verdict.startswith("verdict: cluster here, profile scale: failed: GPUs")


def test_what_slurm_would_refuse(check: Check) -> None:
    scale = check.profile(gpus=16)
    done = check("--quick", "--profile", scale, partition="mian")
    assert done.code == 2
    assert "did you mean 'main'?" in done.line("sbatch accepts train")[1]
    done = check("--quick", "--profile", scale, gpus_per_node=8)
    assert done.code == 2
    word, text = done.line("sbatch accepts train")
    assert "change gpus_per_node" in text
    assert word == "failed" and "Requested node configuration is not available" in text
    done = check("--quick", "--profile", scale)
    assert "--nodes=8" in done.line("sbatch accepts train")[1]
    assert done.line("sbatch accepts embed, sample, score")[0] == "ok"


def test_nodes_that_are_drained(check: Check, cluster: Cluster) -> None:
    scale = check.profile(gpus=4)
    cluster.run("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=fan is broken")
    done = check("--quick", "--profile", scale)
    assert done.code == 2
    assert done.line("nodes of main")[0] == "warning"
    assert "node2 drained (fan is broken)" in done.line("nodes of main")[1]
    cluster.run("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=power")
    done = check()
    assert done.code == 2
    word, text = done.line("nodes of main")
    assert word == "failed" and "node1 drained (power)" in text
    assert "not submitted" in done.line("trial job in main")[1]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_a_results_folder_that_nodes_do_not_share(check: Check) -> None:
    # A disk that this command alone sees, mounted over the place that nodes know.
    check.results.mkdir()
    mounted = f'mount -t tmpfs none {check.results} && exec "$@"'
    command = [sys.executable, "-m", "reproduce.cli", *check.command()]
    ran = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounted, "sh", *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    done = examination(ran.returncode, ran.stdout, ran.stderr)
    assert done.code == 2
    word, text = done.line(f"the folder {check.results}")
    assert word == "failed" and "not writable on node" in text
    assert "a file system that all nodes share" in text


def test_jobs_whose_python_does_not_start(check: Check) -> None:
    done = check(environment={"PYTHONHOME": "/nowhere"})
    assert done.code == 2
    word, text = done.line("Python in a job")
    assert word == "failed" and "No module named 'encodings'" in text
    done = check(container={"kind": "podman", "image": "no-such-image"})
    assert done.line("Python in a job")[0] == "failed"
    assert done.code == 2


def test_a_trial_that_does_not_start_is_a_warning(
    check: Check, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "START_SECONDS", 3)
    blocking = cluster.submit("sleep 300", "--nodes=2", "--exclusive")
    cluster.wait_running(blocking)
    found = check_cluster(Case(ClusterProfile(**GOOD), {"train": Needs()}, check.results))
    trials = [each for each in found if each.what == "trial job in main"]
    assert [each.word for each in trials] == ["warning"]
    assert "did not start within 3 s: waiting for free nodes or GPUs" in trials[0].found
    assert cluster.run("squeue", "--noheader", "--format=%i") == blocking
