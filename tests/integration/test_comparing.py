"""Runs compared and people asked through the command line: what is printed, what is refused."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from run_folders import write_run

from reproduce.experiment import ROOT

PROMPTS = ("a cat", "a dog", "a bird", "a fish")


def g2rpo(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reproduce.cli", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def refused(*arguments: str | Path, cwd: Path) -> str:
    """The one line that is said of a mistake."""
    done = g2rpo(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two folders of tiny pictures, and the prompts that they are of."""
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    for name, shade in (("dark", 10), ("bright", 200)):
        (tmp_path / name).mkdir()
        for index in range(len(PROMPTS)):
            path = tmp_path / name / f"{index:06d}.png"
            Image.new("RGB", (8, 8), (shade, index, 0)).save(path)
    return tmp_path


def fill(sheet: Path, rater: str, wins: int) -> Path:
    """Answers from the sheet's own table: bright pictures win the first ``wins`` pairs."""
    rows = list(csv.DictReader((sheet / "answers.csv").open()))
    for index, row in enumerate(rows):
        bright_left = Image.open(sheet / "images" / f"{row['pair']}a.png").getpixel((0, 0))[0] > 100
        left = bright_left == (index < wins)
        row |= {"rater": rater, "answer": "left" if left else "right"}
    path = sheet.parent / f"{rater}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_people_are_asked_and_their_answers_read(pictures: Path) -> None:
    sides = ("bright", "dark", "--prompts", "prompts.txt")
    made = g2rpo("raters", "make", *sides, "-o", "sheet", cwd=pictures)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("sheet/index.html: 4 pairs")
    assert not list((pictures / "sheet").rglob("*key*"))
    answers = [fill(pictures / "sheet", rater, wins) for rater, wins in (("ann", 4), ("bob", 2))]
    read = g2rpo("raters", "read", "sheet-key.json", *answers, cwd=pictures)
    assert read.returncode == 0, read.stderr
    lines = [" ".join(line.split()) for line in read.stdout.splitlines()]
    assert lines[:2] == ["first: bright", "second: dark"]
    assert lines[2].startswith("6 answers for the first, 2 for the second, 0 ties, 0 missing")
    assert any(line.startswith("first preferred 0.750 ") for line in lines)
    assert any(line.startswith("ann, without ties 1.000 ") for line in lines)
    assert lines[-1].endswith("raters agree on 50%")

    rest, _ = answers[1].read_text().rstrip().rsplit(",", 1)
    answers[1].write_text(f"{rest},lefft\n")
    told = refused("raters", "read", "sheet-key.json", *answers, cwd=pictures)
    assert "bob.csv, line 5: no answer" in told and "did you mean 'left'?" in told


def test_runs_are_listed_and_compared(tmp_path: Path) -> None:
    runs = tmp_path / "results" / "runs"
    write_run(runs, "g2rpo-hps-seed1-aa", means={"hps": 0.72})
    write_run(runs, "mix_grpo-hps-seed1-bb", means={"hps": 0.70}, method={"name": "mix_grpo"})
    listed = g2rpo("runs", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert {line.split()[0] for line in listed.stdout.splitlines()[1:]} == {
        "g2rpo-hps-seed1-aa",
        "mix_grpo-hps-seed1-bb",
    }
    compared = g2rpo("compare", "mix", "g2rpo", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    lines = [line.split() for line in compared.stdout.splitlines()]
    (delta,) = (line for line in lines if line[:1] == ["B"] and "+0.0200" in line)
    assert delta[-3:] == ["checkpoint,", "seed", "1"] and "higher" in delta
    told = refused("compare", "mixgrpo", "g2rpo", cwd=tmp_path)
    assert "did you mean 'mix_grpo-hps-seed1-bb'?" in told
