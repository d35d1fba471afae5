"""What goes into the image and what must not, the words it understands, and who calls make."""

import fnmatch
import os
import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def in_context(name: str) -> bool:
    """Whether .dockerignore leaves a file in the build context: the last pattern decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parts = PurePosixPath(name).parts
        above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        if pattern.startswith("**/"):
            hit = any(fnmatch.fnmatch(part, pattern[3:]) for part in parts)
        else:
            hit = any(fnmatch.fnmatch(path, pattern) and path.count("/") == pattern.count("/")
                      for path in above)  # fmt: skip
        if hit:
            kept = line.startswith("!")
    return kept


@pytest.mark.parametrize(
    "name",
    [
        ".git/config", ".git", ".venv/bin/python", ".uv/bin/uv", ".env", ".netrc",
        "results/runs/x/manifest.json", "results/mini/table1/table1.md", "data/hpdv2/train.txt",
        "build/g2rpo.tar", "tests/conftest.py", "g2rpo/__pycache__/config.cpython-311.pyc",
        "g2rpo/.env", "docker/.netrc", "g2rpo.egg-info/PKG-INFO", ".mypy_cache/x", "secret.pem",
    ],
)  # fmt: skip
def test_what_is_kept_out_of_the_build_context(name: str) -> None:
    assert not in_context(name)


def test_the_build_context_has_the_code_and_is_small() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    context = [name for name in listed if in_context(name)]
    assert {
        "pyproject.toml", "Makefile", "docker/entrypoint.sh", "uv.lock",
        "reproduce/profiles/mini.yaml", "results/paper/tables.yaml",
        "benchmarks/mini_world/assets/prompts/test.txt",
    } <= set(context)  # fmt: skip
    package = re.compile(r"^(benchmarks|g2rpo|reproduce|slurm)/")
    assert not [name for name in listed if package.match(name) and name not in context]
    assert sum((ROOT / name).stat().st_size for name in context) < 35e6


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return {name for line in re.findall(r"^([a-z0-9 -]+):", text, re.MULTILINE)
            for name in line.split()}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=str)
def test_workflows_call_targets_that_exist_with_no_more_rights_than_reading(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    called = []
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", step["uses"])
            called += re.findall(r"\bmake ([a-z0-9-]+)", step.get("run", ""))
    assert called
    assert not set(called) - targets()


def test_the_image_builds_without_what_buildah_does_not_know() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    assert "<<" not in text and "--mount" not in text
    assert re.search(r"^ARG BASE_IMAGE=nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04$", text, re.M)
    assert re.search(r"^USER (?!0|root)", text, re.M)
    for word in ("HEALTHCHECK", 'ENTRYPOINT ["g2rpo-entrypoint"]', 'CMD ["check", "image"]'):
        assert word in text


def test_apptainer_reads_the_archive_that_make_sif_writes() -> None:
    definition = (ROOT / "docker" / "g2rpo.def").read_text()
    archive = re.search(r"^From: (\S+)$", definition, re.M)
    assert archive is not None
    assert f"ARCHIVE={archive.group(1)}\n" in (ROOT / "docker" / "build-sif.sh").read_text()
    assert 'exec g2rpo-entrypoint "$@"' in definition


@pytest.mark.parametrize("name", ["build-image", "build-sif"])
def test_without_an_engine_there_is_one_line(name: str, tmp_path: Path) -> None:
    for program in ("bash", "dirname", "basename", "git", "sed", "date", "mkdir", "rm"):
        (tmp_path / program).symlink_to(f"/usr/bin/{program}")
    done = subprocess.run(
        [ROOT / "docker" / f"{name}.sh"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder that stands for the image: its entry script with programs that say what they do."""
    text = (ROOT / "docker" / "entrypoint.sh").read_text()
    text = text.replace("CODE=/opt/g2rpo\n", f"CODE={ROOT}\n")
    text = text.replace("VERBS=/usr/share/g2rpo/verbs\n", f"VERBS={tmp_path}/verbs\n")
    (tmp_path / "entrypoint.sh").write_text(text)
    (tmp_path / "verbs").write_text("reproduce\ntrain\ncheck\nscore\n")
    (tmp_path / "bin").mkdir()
    for program in ("g2rpo", "make", "python"):
        path = tmp_path / "bin" / program
        path.write_text(f'#!/bin/bash\necho {program} "$@"\n')
        path.chmod(0o755)
    (tmp_path / "work").mkdir()
    return tmp_path


def enter(image: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", image / "entrypoint.sh", *words],
        cwd=image / "work",
        env=os.environ | {"PATH": f"{image / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["check", "--require-gpu"], "g2rpo check --require-gpu"),
        (["train", "table1", "hps/g2rpo"], "g2rpo train table1 hps/g2rpo"),
        (["g2rpo", "weights", "list"], "g2rpo weights list"),
        (["--version"], "g2rpo --version"),
        (["python", "-c", "a b"], "python -c a b"),
        (["bash", "-c", "echo $PWD"], "/work"),
        (["reproduce-table1", "PROFILE=mini"], "reproduce-table1 PROFILE=mini"),
        (["smoke"], "VENV=/opt/venv READY= smoke"),
    ],
)
def test_the_first_word_decides(image: Path, words: list[str], expected: str) -> None:
    done = enter(image, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(expected)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["tabel1"], "unknown command 'tabel1'"),
        (["check-image"], "make check-image needs a checkout"),
        (["smoke"], "cannot write to"),
        (["reproduce", "table1"], "cannot write to"),
    ],
)
def test_a_refusal_is_one_line(image: Path, words: list[str], problem: str) -> None:
    (image / "work" / "results").write_text("not a folder")
    done = enter(image, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert problem in done.stderr


def test_help_lists_the_targets_that_run_in_the_image(image: Path) -> None:
    usage = enter(image, "help").stdout
    assert "reproduce-table1" in usage and "mini-world" in usage and "train" in usage
    assert "lint" not in usage and "check-image" not in usage


def test_a_real_make_runs_the_image_s_packages_without_setting_up(image: Path) -> None:
    (image / "bin" / "make").unlink()
    done = enter(image, "smoke", "SEEDS=1,2", "--dry-run")
    assert done.returncode == 0, done.stderr
    wanted = "/opt/venv/bin/g2rpo reproduce table1 --profile smoke --seeds 1,2"
    assert done.stdout.strip() == f"HF_HUB_OFFLINE=1 {wanted}"
