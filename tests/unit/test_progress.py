"""The lines that progress prints outside of a terminal."""

import pytest

from g2rpo.progress import ProgressReport


@pytest.mark.parametrize(
    ("updates", "printed"), [([8], [8]), ([1, 8], [1, 8]), ([1, 2, 3], [1, 3])]
)
def test_the_last_line_is_printed_once(
    updates: list[int], printed: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressReport("score hps", 8) as report:
        for done in updates:
            report.update(done)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"score hps: {done}/8" for done in printed]


def test_nothing_is_printed_without_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport("score hps", 8):
        pass
    assert capsys.readouterr().err == ""
