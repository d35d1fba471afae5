"""`metrics.jsonl` on disk: a line cut short by a kill is ignored, a damaged one is an error."""

import json
from pathlib import Path

import pytest

from g2rpo.errors import UserError
from g2rpo.training.metrics import MetricsLog, read_metrics

ROWS = [{"iteration": i, "reward/hps/mean": 0.1 * i} for i in range(1, 5)]
LINES = [json.dumps(row).encode() for row in ROWS]
DAMAGED = (
    b'{"iteration": 2, "rew',
    b"3",
    b"[]",
    b'{"reward/hps/mean": 0.2}',
    b'{"iteration": 2.5}',
    b'{"iteration": true}',
    b'{"iteration": 2, "note": "\xff"}',
    b"\x00\x00\x00",
)


def written(folder: Path, *lines: bytes) -> Path:
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_among_others_is_an_error_and_nothing_is_rewritten(
    tmp_path: Path, line: bytes
) -> None:
    path = written(tmp_path, LINES[0], line, *LINES[2:])
    before = path.read_bytes()
    for read in (read_metrics, lambda path: MetricsLog(path, 4)):
        with pytest.raises(UserError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}, line 2: not a JSON object with")
        assert "\n" not in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", DAMAGED)
def test_a_last_line_cut_short_is_left_out_and_written_over(tmp_path: Path, line: bytes) -> None:
    path = written(tmp_path, *LINES[:3], line)
    assert read_metrics(path) == ROWS[:3]
    log = MetricsLog(path, 3)
    log.append(ROWS[3])
    assert read_metrics(path) == ROWS


def test_rows_after_the_checkpoint_are_dropped_and_empty_lines_are_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, LINES[0], b"", *LINES[1:], b"", b"")
    assert read_metrics(path) == ROWS
    MetricsLog(path, 2)
    assert read_metrics(path) == ROWS[:2]


def test_a_validation_is_added_to_the_last_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path, 0)
    assert not first.validated
    first.add_validation({"validation/hps": 0.5})
    first.append({"iteration": 1, "loss": 2.0})
    resumed = MetricsLog(path, 1)
    assert not resumed.validated
    resumed.add_validation({"validation/hps": 0.75})
    assert MetricsLog(path, 1).validated
    start = {"iteration": 0, "rollout_evaluations": 0, "seconds": 0.0, "validation/hps": 0.5}
    assert read_metrics(path) == [start, {"iteration": 1, "loss": 2.0, "validation/hps": 0.75}]


@pytest.mark.parametrize("value", ["null", '"0.2"', "NaN", "true", "[]"])
def test_a_reward_that_is_not_a_number_is_an_error(tmp_path: Path, value: str) -> None:
    line = f'{{"iteration": 2, "reward/hps/mean": {value}}}'.encode()
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: reward/hps/mean is not a number"):
        read_metrics(written(tmp_path, LINES[0], line))
