"""Sheets for raters: nothing in them tells the sides; and what answers say, against scipy."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from PIL import Image, PngImagePlugin
from run_folders import write_evaluation, write_run
from typer.testing import CliRunner

from g2rpo.errors import UserError
from reproduce.cli import app
from reproduce.raters.answers import evaluate, read_answers, wilson
from reproduce.raters.key import COLUMNS, SheetKey, read_key
from reproduce.raters.pictures import find_sides
from reproduce.raters.sheet import FIXED_TIME, key_path, make_sheet

PROMPTS = 12
FIRST, SECOND = "g2rpo-hps-seed1-aa", "base-cc"


def write_pictures(evaluation: Path, base: int, size: int = 8) -> None:
    """A picture of each prompt, its text, and metadata that would tell whose it is."""
    scores = pd.read_parquet(evaluation / "scores.parquet")
    scores["prompt"] = "a caption of " + scores["prompt_id"]
    scores.to_parquet(evaluation / "scores.parquet", index=False)
    folder = evaluation / "images"
    folder.mkdir(parents=True)
    for index in range(PROMPTS):
        metadata = PngImagePlugin.PngInfo()
        metadata.add_text("model", str(evaluation))
        pixels = np.full((size, size, 3), base + index, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{index:03d}.png", pnginfo=metadata)


def make_sides(folder: Path) -> Path:
    """A run and a base with pictures of the same prompts."""
    write_run(folder / "runs", FIRST, means={"hps": 0.7})
    write_evaluation(folder / "runs" / SECOND, {"hps": 0.69})
    for name, base in ((FIRST, 0), (SECOND, 100)):
        write_pictures(folder / "runs" / name / "evaluations" / "test-0123456789ab", base)
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return make_sides(tmp_path)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SheetKey:
    """The key of a sheet, for answers."""
    return sheet(make_sides(tmp_path_factory.mktemp("sheet")))[1]


def sheet(results: Path, *, pairs: int | None = None, seed: int = 7) -> tuple[Path, SheetKey]:
    output = results / "sheet"
    sides = find_sides([FIRST, "base"], results, None)
    return output, make_sheet(sides, output, pairs=pairs, seed=seed)


def test_each_picture_is_where_the_key_says(results: Path) -> None:
    output, key = sheet(results)
    assert read_key(key_path(output)) == key
    assert [pair.pair for pair in key.pairs] == [f"{n:03d}" for n in range(1, PROMPTS + 1)]
    for pair in key.pairs:
        pixel = {side: np.asarray(Image.open(output / "images" / f"{pair.pair}{side}.png"))[0, 0, 0]
                 for side in "ab"}  # fmt: skip
        index = int(pair.prompt_id[1:])
        shown = (index, 100 + index) if pair.left == "first" else (100 + index, index)
        assert (pixel["a"], pixel["b"]) == shown
        assert pair.prompt == f"a caption of {pair.prompt_id}"
    assert len({pair.prompt_id for pair in key.pairs}) == PROMPTS
    assert sum(pair.left == "first" for pair in key.pairs) == PROMPTS // 2
    assert [pair.prompt_id for pair in key.pairs] != sorted(p.prompt_id for p in key.pairs)


def test_nothing_in_the_folder_tells_the_sides(results: Path) -> None:
    output, key = sheet(results)
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "index.html", "answers.csv",
        *(f"{pair.pair}{side}.png" for pair in key.pairs for side in "ab"),
    }  # fmt: skip
    assert {path.stat().st_mtime for path in (*output.rglob("*"), output)} == {FIXED_TIME}
    secrets = [FIRST, SECOND, "g2rpo-hps", "base", "first", "second", str(results)]
    secrets += [value for pair in key.pairs for value in (pair.first_sha256, pair.second_sha256)]
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".png":
            chunks = re.findall(rb"IHDR|IDAT|IEND|tEXt|iTXt|zTXt|eXIf|tIME", data)
            assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}
            continue
        # Only the captions may have such words, and these have not.
        for secret in secrets:
            assert secret.encode() not in data, (path.name, secret)
    page = (output / "index.html").read_text()
    assert not re.findall(r"https?://", page)
    assert page.count("<section") == PROMPTS and page.count("<img ") == 2 * PROMPTS


def test_the_seed_decides_the_sides_of_a_random_part(results: Path) -> None:
    _, few = sheet(results, pairs=5)
    assert len(few.pairs) == 5
    assert sorted(pair.left for pair in few.pairs).count("first") in (2, 3)
    shutil.rmtree(results / "sheet")
    key_path(results / "sheet").unlink()
    made = []
    for seed in (7, 7, 8):
        output, key = sheet(results, seed=seed)
        made.append((key, (output / "index.html").read_bytes()))
        shutil.rmtree(output)
        key_path(output).unlink()
    assert made[0] == made[1]
    (key, _), _, (other, _) = made
    assert other.sheet != key.sheet
    assert [pair.left for pair in other.pairs] != [pair.left for pair in key.pairs]


def test_what_cannot_be_compared_is_refused(results: Path) -> None:
    evaluation = results / "runs" / SECOND / "evaluations" / "test-0123456789ab"
    with pytest.raises(UserError, match="only 12 prompts have"):
        sheet(results, pairs=13)
    Image.new("RGB", (16, 16)).save(evaluation / "images" / "p003.png")
    with pytest.raises(UserError, match="'p003': the images differ in size"):
        sheet(results)
    assert not (results / "sheet").exists() and not key_path(results / "sheet").exists()
    shutil.rmtree(evaluation / "images")
    with pytest.raises(UserError, match="no images of the same prompt"):
        sheet(results)
    manifest = json.loads((evaluation / "manifest.json").read_text())
    manifest["inputs"]["protocol"]["seed"] = 2
    (evaluation / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="share no evaluation"):
        sheet(results)
    (results / "sheet").mkdir()
    with pytest.raises(UserError, match="already exists"):
        make_sheet([], results / "sheet", pairs=None, seed=1)


def test_a_sheet_never_stands_without_its_key(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for place in ("reproduce.raters.sheet.write_json", "g2rpo.files.publish_folder"):
        with monkeypatch.context() as patched:
            patched.setattr(place, stop)
            with pytest.raises(KeyboardInterrupt):
                sheet(results)
        assert not (results / "sheet").exists(), place
    stopped = read_key(key_path(results / "sheet"))
    output, key = sheet(results, seed=8)
    assert read_key(key_path(output)) == key != stopped
    assert read_key(results / f"sheet-key-{stopped.sheet}.json") == stopped
    with pytest.raises(UserError, match="already exists"):
        sheet(results)
    key_path(output).unlink()
    with pytest.raises(UserError, match=r"a sheet without its key sheet-key\.json; delete it"):
        sheet(results)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("notes.md/deep/s", "notes.md is not a folder"),
        (".", "not a new folder; use e.g. sheet"),
        ("..", "not a new folder; use e.g. ../sheet"),
        ("notes.md", "already exists"),
        ("kept", "kept-key.json: exists and is not a key"),
        ("x" * 300, "cannot be created (File name too long)"),
    ],
)
def test_where_no_sheet_can_be_is_one_line_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("words\n")
    Path("kept-key.json").write_text("{}\n")
    made = CliRunner().invoke(app, ["raters", "make", "absent", "absent-too", "-o", output])
    assert isinstance(made.exception, UserError), made.exception
    assert message in str(made.exception) and "\n" not in str(made.exception)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.md", "kept-key.json"}


def test_a_side_is_not_compared_with_itself(results: Path) -> None:
    with pytest.raises(UserError, match="the same images"):
        find_sides([FIRST, "g2rpo-hps"], results, None)
    with pytest.raises(UserError, match="the same images"):
        find_sides([str(results), f"{results}/runs/.."], results, None)


def write_folder(folder: Path, names: list[str], shade: int) -> Path:
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(folder / f"{name}.png")
    return folder


def test_folders_of_pictures_are_compared_by_a_prompt_set_that_may_be_larger(results: Path) -> None:
    first = write_folder(results / "one", ["000000", "000001", "000002"], 10)
    second = write_folder(results / "two", ["000001", "000002"], 200)
    prompts = results / "prompts.txt"
    prompts.write_text("a cat\na dog\na bird\na cow\n")
    sides = find_sides([str(first), str(second)], results, prompts)
    key = make_sheet(sides, results / "sheet", pairs=None, seed=1)
    assert sorted(pair.prompt for pair in key.pairs) == ["a bird", "a dog"]
    assert key.protocol is None and key.first == str(first)


def test_pictures_without_a_prompt_are_refused_or_left_out(results: Path) -> None:
    first = write_folder(results / "one", ["a", "b", "c"], 10)
    second = write_folder(results / "two", ["a", "b"], 200)
    for folder in (first, second):
        for name in ("a", "b"):
            (folder / f"{name}.txt").write_text(f"a caption of {name}\n")
    arguments = ["raters", "make", str(first), str(second), "-o", str(results / "sheet")]
    refused = CliRunner().invoke(app, arguments)
    assert "1 image cannot be compared: c: no prompt" in str(refused.exception)
    assert "--skip-bad" in str(refused.exception)
    made = CliRunner().invoke(app, [*arguments, "--skip-bad"])
    assert made.exit_code == 0, made.output
    assert "2 pairs" in made.output and f"{first}: skipped c: no prompt" in made.output


Choose = Callable[[int, str], str]


def write_answers(path: Path, key: SheetKey, rater: str, choose: Choose) -> Path:
    """A rater's file; ``choose`` names the side that wins the pair, ``tie``, or nothing."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for index, pair in enumerate(key.pairs):
            winner = choose(index, pair.prompt_id)
            answer = winner
            if winner in ("first", "second"):
                answer = "left" if winner == pair.left else "right"
            writer.writerow([key.sheet, rater, pair.pair, answer])
    return path


def test_the_blinding_is_undone_and_counted(key: SheetKey, tmp_path: Path) -> None:
    choices = ["first"] * 8 + ["second"] * 3 + ["tie"]
    path = write_answers(tmp_path / "a.csv", key, "ann", lambda i, _: choices[i])
    verdict = evaluate(key, read_answers([path], key))
    assert verdict.outcomes == {"first": 8, "second": 3, "tie": 1}
    assert verdict.win_rate.mean == pytest.approx(8.5 / 12) and verdict.win_rate.count == 12
    assert verdict.win_rate.low < 8.5 / 12 < verdict.win_rate.high
    expected = scipy.stats.binomtest(8, 11).proportion_ci(0.95, method="wilson")
    assert (verdict.decided.low, verdict.decided.high) == pytest.approx(tuple(expected))
    assert verdict.raters == {"ann": verdict.decided}
    assert (verdict.agreement, verdict.over_raters, verdict.missing) == (None, None, 0)
    # 2^11 signs of the pairs that are no tie: as extreme are those with a net of five or more.
    extreme = sum(scipy.stats.binom.pmf(k, 11, 0.5) for k in (0, 1, 2, 3, 8, 9, 10, 11))
    assert verdict.p_value == pytest.approx(extreme)


def test_several_raters_are_a_sample_of_their_own(key: SheetKey, tmp_path: Path) -> None:
    files = [
        write_answers(tmp_path / "a.csv", key, "", lambda *_: "first"),
        write_answers(tmp_path / "b.csv", key, "", lambda i, _: "first" if i else "tie"),
        write_answers(tmp_path / "c.csv", key, "", lambda i, _: "second" if i < 6 else ""),
    ]
    verdict = evaluate(key, read_answers(files, key))
    rates = [1.0, 11.5 / 12, 0.0]
    people = verdict.over_raters
    assert people is not None
    t = scipy.stats.ttest_1samp(rates, 0).confidence_interval(0.95)
    assert people.mean == pytest.approx(np.mean(rates))
    assert (people.low, people.high) == pytest.approx((max(0, t.low), min(1, t.high)))
    assert set(verdict.raters) == {"a", "b", "c"} and verdict.missing == 6
    same = [11 / 12 * 12, 0, 0]  # a and b on 12 pairs; a and c, b and c on 6 each
    assert verdict.agreement == pytest.approx(sum(same) / 24)
    shares = [(1 + 0.5 + 0) / 3, *[2 / 3] * 5, *[1.0] * 6]
    assert verdict.win_rate.mean == pytest.approx(np.mean(shares))


def test_one_sided_answers_leave_room(key: SheetKey, tmp_path: Path) -> None:
    path = write_answers(tmp_path / "a.csv", key, "ann", lambda *_: "first")
    verdict = evaluate(key, read_answers([path], key))
    exact = scipy.stats.binomtest(12, 12).proportion_ci(0.95, method="exact")
    assert (verdict.win_rate.low, verdict.win_rate.high) == pytest.approx((exact.low, 1.0))
    assert wilson(0, 0).count == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("SHEET,ann,099,left", "line 2: unknown pair '099'; pairs are 001 to 012"),
        ("SHEET,ann,001,lefft", "line 2: unknown answer 'lefft'; did you mean 'left'?"),
        ("other,ann,001,left", "line 2: sheet 'other' does not match"),
        ("SHEET,ann,001,left\nSHEET,ann,1,right", "line 3: ann already answered pair 001"),
        ("SHEET,ann,001,", "ann: no answers"),
        ("SHEET,ann", "line 2: 2 values, but the header has 4"),
        ("SHEET,ann,,left", "line 2: unknown pair ''"),
        ("SHEET,ann,001,left", "at least two answered pairs"),
        ('SHEET,ann,001,"left', "not valid CSV"),
        ("", "the files contain no answers"),
    ],
)
def test_malformed_answers_are_one_line(
    key: SheetKey, tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sheet,rater,pair,answer\n" + line.replace("SHEET", key.sheet) + "\n")
    with pytest.raises(UserError) as error:
        evaluate(key, read_answers([path], key))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_answers_or_key_are_refused(results: Path) -> None:
    output, key = sheet(results)
    path = results / "a.csv"
    path.write_text("sheet,pair,answer\n")
    with pytest.raises(UserError, match=r"a\.csv: no column 'rater'"):
        read_answers([path], key)
    with pytest.raises(UserError, match="no such file"):
        read_answers([results / "absent.csv"], key)
    (results / "a.json").write_text("[]")
    with pytest.raises(UserError, match=r"a\.json: not a \.csv file"):
        read_answers([results / "a.json"], key)
    with pytest.raises(UserError, match="no such file"):
        read_key(results / "absent.json")
    with pytest.raises(UserError, match="cannot read the key"):
        read_key(output / "index.html")
    (results / "other.json").write_text('{"format": "g2rpo table"}')
    with pytest.raises(UserError, match="not the key of a sheet"):
        read_key(results / "other.json")


@pytest.mark.parametrize("mark", [",", ";"])
def test_answers_saved_by_a_spreadsheet_are_read(key: SheetKey, tmp_path: Path, mark: str) -> None:
    rows = [["\ufeffsheet", "rater", "pair", "answer"]]
    rows += [[key.sheet, "Ann B", str(int(pair.pair)), "Left"] for pair in key.pairs]
    path = tmp_path / "a.csv"
    path.write_text("\r\n".join(mark.join(row) for row in rows))
    (answers,) = read_answers([path], key).values()
    assert set(answers.values()) == {"left"} and len(answers) == PROMPTS


def test_the_commands_make_and_read(results: Path, tmp_path: Path) -> None:
    runner, output = CliRunner(), tmp_path / "given"
    arguments = ["raters", "make", "g2rpo-hps", "base", "-o", str(output)]
    made = runner.invoke(app, [*arguments, "--results", str(results)])
    assert made.exit_code == 0, made.output
    assert "12 pairs (of 20 prompts)" in made.output and "given-key.json" in made.output
    again = runner.invoke(app, [*arguments[:-1], f"{output}-2", "--results", str(results)])
    assert again.exit_code == 0
    key, other = (read_key(key_path(path)) for path in (output, Path(f"{output}-2")))
    assert key.sheet != other.sheet, "the blinding is drawn anew each time"
    files = [
        write_answers(tmp_path / "a.csv", key, "ann", lambda i, _: "first" if i else "tie"),
        write_answers(tmp_path / "b.csv", key, "bob", lambda i, _: "first" if i % 2 else "second"),
    ]
    shown = runner.invoke(app, ["raters", "read", str(key_path(output)), *map(str, files)])
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.output.splitlines()]
    assert lines[0].startswith("first: g2rpo-hps") and lines[1].startswith("second: base")
    assert lines[2] == "17 answers for the first, 6 for the second, 1 ties, 0 missing"
    assert any(
        re.match(r"first preferred 0\.729 0\.\d{3} to 0\.\d{3} 12 pairs", line) for line in lines
    )
    assert any(line.startswith("ann, without ties 1.000 ") for line in lines)
    assert lines[-1].endswith("raters agree on 50%")
