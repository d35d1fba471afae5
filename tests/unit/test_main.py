"""The entry point: what the file system refuses is one line, bugs keep their traceback."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from g2rpo.files import atomic_write_text
from reproduce import cli


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["g2rpo", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    return told


def test_a_page_that_cannot_be_written_is_refused_before_it_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr("reproduce.runner.build_assets", computed)
    file = tmp_path / "file"
    file.touch()
    for output, told in (
        (tmp_path, f"is a folder; name a file, such as {tmp_path / 'report.html'}"),
        (file / "below" / "page.html", f"{file} is no folder"),
    ):
        arguments = ("report", "table3", "--profile", "mini", "--publish", "--output", str(output))
        assert refused(*arguments, capsys=capsys).startswith(f"error: {output}: {told}")


def test_a_path_that_the_file_system_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: dict[str, Callable[[], object]] = {
        f"{tmp_path}: Is a directory": tmp_path.read_text,
        f"{tmp_path / 'absent'}: No such file or directory": (tmp_path / "absent").read_text,
    }
    for told, app in cases.items():
        monkeypatch.setattr(cli, "app", app)
        assert refused(capsys=capsys) == f"error: {told}\n"
    (tmp_path / "target").mkdir()
    # It is renamed to its name at last: the name is told, not the temporary file's.
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
