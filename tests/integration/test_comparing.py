"""`g2rpo raters`: from two folders of images to a sheet, and from answers to a verdict."""

import csv
from pathlib import Path

import pytest
from command_line import g2rpo_here
from PIL import Image

PROMPTS = ("a cat", "a dog", "a bird", "a fish")


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


def test_people_are_asked_and_their_answers_read(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = ("bright", "dark", "--prompts", "prompts.txt")
    assert g2rpo_here(pictures, "raters", "make", *sides, "-o", "sheet") == 0
    assert capsys.readouterr().out.startswith("sheet/index.html: 4 pairs")
    assert not list((pictures / "sheet").rglob("*key*"))
    answers = [fill(pictures / "sheet", rater, wins) for rater, wins in (("ann", 4), ("bob", 2))]
    read = ("raters", "read", "sheet-key.json", *map(str, answers))
    assert g2rpo_here(pictures, *read) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == ["first: bright", "second: dark"]
    assert lines[2].startswith("6 answers for the first, 2 for the second, 0 ties, 0 missing")
    assert any(line.startswith("first preferred 0.750 ") for line in lines)
    assert any(line.startswith("ann, without ties 1.000 ") for line in lines)
    assert lines[-1].endswith("raters agree on 50%")

    rest, _ = answers[1].read_text().rstrip().rsplit(",", 1)
    answers[1].write_text(f"{rest},lefft\n")
    assert g2rpo_here(pictures, *read) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ")
    assert "bob.csv, line 5: " in printed.err and "did you mean 'left'?" in printed.err
    assert printed.err.count("\n") == 1
