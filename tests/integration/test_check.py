"""`g2rpo check` as a user starts it, on a machine without a GPU."""

from pathlib import Path

from forked import Command


def lines_of(text: str) -> dict[str, str]:
    """Each line of the report by the name of its check."""
    names = ("machine", "GPU", "packages", "code", "shared memory", "results", "weights")
    found = {}
    for line in text.splitlines():
        _, _, rest = line.partition(" ")
        for name in (*names, "train to table", "FLUX blocks"):
            if rest.strip().startswith(name):
                found[name] = line
    return found


def test_everything_is_looked_at_and_run_once(tmp_path: Path) -> None:
    words = ("check", "--results", "results")
    code, shown, errors = Command(tmp_path, *words, CUDA_VISIBLE_DEVICES="").wait()
    assert code == 0, shown + errors
    lines = lines_of(shown)
    assert "FLUX blocks" not in lines
    assert len(lines) == 8
    assert lines["train to table"].startswith("ok ") and "GiB" in lines["train to table"]
    assert shown.splitlines()[-1].startswith("verdict: ready")
    # Nothing is left behind.
    assert list(tmp_path.iterdir()) == []


def test_what_must_be_fixed_is_named_last_with_exit_code_2(tmp_path: Path) -> None:
    options = ("--quick", "--require-gpu", "--results", "/proc/results")
    code, shown, errors = Command(tmp_path, "check", *options, CUDA_VISIBLE_DEVICES="").wait()
    assert code == 2
    assert "Traceback" not in errors
    lines = lines_of(shown)
    assert lines["results"].startswith("failed ") and "cannot write to" in lines["results"]
    assert "train to table" not in lines
    last = shown.splitlines()[-1]
    assert last.startswith("verdict: failed: GPU, results")
