"""The entry point: what the file system refuses is one line, bugs keep their traceback."""

import errno
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_folders import write_run
from typer.testing import CliRunner

from g2rpo.files import atomic_write_text
from g2rpo.methods.presets import preset_names
from g2rpo.quiet import LEVEL_VARIABLE
from g2rpo.rewards.registry import REWARDS
from reproduce import cli
from reproduce.bundled import bundled_names


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["g2rpo", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def printed(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "400"}).invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_version_names_the_code_torch_and_cuda() -> None:
    first, *rest = printed("--version").splitlines()
    assert re.fullmatch(r"g2rpo \d+\.\d+\.\d+( \([0-9a-f]{12}(, modified)?\))?", first)
    assert rest[0] == f"torch {torch.__version__}" and rest[1].startswith("CUDA ")


def test_list_has_a_line_for_everything_bundled() -> None:
    lines = [line.split() for line in printed("list").splitlines()[1:]]
    assert all(len(words) > 2 for words in lines)
    assert [words[1] for words in lines] == [
        *bundled_names("experiments"), *bundled_names("profiles"), *bundled_names("suites"),
        *bundled_names("protocols"), *preset_names(), *REWARDS,
    ]  # fmt: skip


def test_help_names_every_command_and_experiment() -> None:
    text = printed("--help")
    for name in ("reproduce", "runs", "weights", "check", "--install-completion", "--quiet"):
        assert name in text
    assert all(name in printed("reproduce", "--help") for name in bundled_names("experiments"))


@pytest.mark.parametrize(("option", "level"), [("-v", "INFO"), ("--quiet", "ERROR")])
def test_the_log_level_is_handed_on_to_workers(
    option: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, "WARNING")
    try:
        printed(option, "weights", "list")
        assert os.environ[LEVEL_VARIABLE] == level
        assert logging.getLogger("g2rpo.lease").getEffectiveLevel() == getattr(logging, level)
    finally:
        for package in ("g2rpo", "reproduce", "benchmarks", "slurm"):
            logging.getLogger(package).setLevel(logging.NOTSET)


def test_a_page_that_cannot_be_written_is_refused_before_it_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr("reproduce.jobs.runner.build_assets", computed)
    file = tmp_path / "file"
    file.touch()
    for output, message in (
        (tmp_path, f"is a folder; give a file, e.g. {tmp_path / 'report.html'}"),
        (file / "below" / "page.html", f"{file} is not a folder"),
    ):
        arguments = ("report", "table3", "--profile", "mini", "--publish", "--output", str(output))
        assert refused(*arguments, capsys=capsys).startswith(f"error: {output}: {message}")


def test_a_path_that_the_file_system_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: dict[str, Callable[[], object]] = {
        f"{tmp_path}: Is a directory": tmp_path.read_text,
        f"{tmp_path / 'absent'}: No such file or directory": (tmp_path / "absent").read_text,
    }
    for message, app in cases.items():
        monkeypatch.setattr(cli, "app", app)
        assert refused(capsys=capsys) == f"error: {message}\n"
    (tmp_path / "target").mkdir()
    # It is renamed to its name at last: the name is message, not the temporary file's.
    monkeypatch.setattr(cli, "app", lambda: atomic_write_text(tmp_path / "target", "text"))
    assert refused(capsys=capsys) == f"error: {tmp_path / 'target'}: Is a directory\n"


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "no file is known"), ValueError("x"), BrokenPipeError(32, "pipe")]
)
def test_other_errors_keep_their_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr(sys, "argv", ["g2rpo"])
    with pytest.raises(type(error)) as raised:
        cli.main()
    assert raised.value is error


def without_unicode(*python: str) -> "subprocess.CompletedProcess[bytes]":
    """Python in a process whose locale is ASCII."""
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONIOENCODING"}
    return subprocess.run(
        [sys.executable, *python], env=environment | plain, capture_output=True, check=False
    )


def test_a_locale_without_unicode_is_named_and_nothing_crashes(tmp_path: Path) -> None:
    folder = tmp_path / "caf\u00e9"
    write_run(folder / "runs", "a")
    write_run(folder / "runs", "b", method={"note": "\u00dcbersicht \u03c3"})
    command = ("-m", "reproduce.cli", "runs", "--results")
    done = without_unicode(*command, str(folder))
    assert (done.returncode, done.stderr.count(b"\n")) == (0, 1)
    assert rb"\xdcbersicht \u03c3" in done.stdout
    assert b"the locale's encoding, ascii, lacks characters" in done.stderr
    opened = "from reproduce import cli; cli.app = lambda: open('caf\\u00e9'); cli.main()"
    for refused_words in (
        ("-c", opened),  # a path in a file
        (*command, str(folder / "absent")),  # a path on the command line
    ):
        done = without_unicode(*refused_words)
        assert done.returncode == 2
        assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
        assert b"the locale's encoding, ascii, lacks characters: set LC_ALL" in done.stderr


def test_a_name_that_is_no_text_is_printed_as_it_is() -> None:
    script = "import os; from reproduce.commands import locales; locales.escape_output(); "
    script += "print(os.fsdecode(b'caf\\xe9.png'), '\u03c3')"
    for encoding, expected in (
        ("utf-8", b"caf\xe9.png \xcf\x83"),
        ("ascii", b"caf\xe9.png \\u03c3"),
    ):
        done = subprocess.run(
            [sys.executable, "-X", "utf8", "-c", script],
            env=os.environ | {"PYTHONIOENCODING": encoding},
            capture_output=True,
            check=True,
        )
        assert done.stdout.strip() == expected
