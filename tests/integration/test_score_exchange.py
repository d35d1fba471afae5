"""Images for external scorers, their scores, and folders that no scorer should see."""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from command_line import refused, succeeded, told_here
from PIL import Image

from benchmarks.mini_world import world
from g2rpo.files import atomic_write_text, sha256_file
from g2rpo.rewards.base import BatchedReward
from g2rpo.rewards.registry import load_reward
from reproduce.stages import score_folder

TAGS = ("counting", "colors", "colors")
SCORE = ("--profile", "mini", "--rewards", "hps")


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    """A set of three prompts in the format of GenEval's, and four images of it."""
    captions = world.make_captions(3, "test", len(TAGS))
    lines = []
    for number, (caption, tag) in enumerate(zip(captions, TAGS, strict=True)):
        published = {"tag": tag, "include": [{"class": "clock", "count": 1}], "prompt": caption}
        lines.append({"id": f"{number:05d}", "style": tag} | published)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "geneval.jsonl").write_text(text)
    (tmp_path / "images").mkdir()
    for number, name in enumerate(("00000_10", "00000_9", "00001", "00002_x")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def tell(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit code, output and errors."""
    return told_here(capsys, Path.cwd(), *arguments)


def export(capsys: pytest.CaptureFixture[str], folder: Path, *more: object) -> tuple[int, str, str]:
    options = ["--prompts", folder / "geneval.jsonl", "--layout", "geneval"]
    command = ["export-images", folder / "images", *options, "--output", folder / "laid out"]
    return tell(capsys, *command, *more)


def evaluate(folder: Path) -> list[dict[str, Any]]:
    """Reads a folder as GenEval's evaluate_images.py does, and calls dark images correct."""
    results = []
    for subfolder in folder.iterdir():
        if not subfolder.is_dir() or not subfolder.name.isdigit():
            continue
        metadata = json.loads((subfolder / "metadata.jsonl").read_text())
        for path in (subfolder / "samples").iterdir():
            with Image.open(path) as image:
                red = np.asarray(image)[0, 0, 0]
            result = {"filename": str(path), "correct": bool(red < 2), "reason": ""}
            result |= {"tag": metadata["tag"], "prompt": metadata["prompt"]}
            results.append(result | {"metadata": json.dumps(metadata)})
    return results


def test_scores_of_geneval_come_back_to_their_images(
    geneval: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = geneval / "geneval.jsonl", geneval / "scores"
    scored = ["--prompts", prompts, *SCORE, "--output", output]
    succeeded(tell(capsys, "score", geneval / "images", *scored))
    before = pd.read_parquet(output / "scores.parquet")
    out = succeeded(export(capsys, geneval))
    assert "4 images of 3 prompts" in out
    laid = geneval / "laid out"
    published = [json.loads(line) for line in prompts.read_text().splitlines()]
    for number, line in enumerate(published):
        (path,) = (laid / f"{number:05d}").glob("*.jsonl")
        own = json.loads(path.read_text())
        assert own == {key: line[key] for key in ("tag", "include", "prompt")}
    order = {"0000.png": "00000_9.png", "0001.png": "00000_10.png"}
    for name, original in order.items():
        copied = (laid / "00000" / "samples" / name).read_bytes()
        assert copied == (geneval / "images" / original).read_bytes()
    results = evaluate(laid)
    file = geneval / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in results))
    assert len(results) == 4
    options = ["--reward", "geneval", "--version", "swin-s", "--output", output]
    out = succeeded(tell(capsys, "import-scores", file, "--images", laid, *options))
    assert "reading images from 'filename' and scores from 'correct'" in out
    scores = pd.read_parquet(output / "scores.parquet")
    own = scores[scores["reward"] == "geneval"].set_index("id")["score"]
    assert own.to_dict() == {"00000_9": 1, "00000_10": 1, "00001": 0, "00002_x": 0}
    kept = scores[scores["reward"] == "hps"].set_index("id")["score"]
    assert kept.to_dict() == before.set_index("id")["score"].to_dict()
    assert set(scores[scores["reward"] == "geneval"]["weights_hash"]) == {sha256_file(file)}
    table = pd.read_csv(output / "summary.csv", keep_default_na=False).set_index("reward")
    lines = table.loc["geneval"]
    assert lines["style"].tolist() == ["", "colors", "counting"]
    assert lines["mean"].tolist() == pytest.approx([1 / 3, 0, 1])
    assert lines["prompts"].tolist() == [3, 2, 1] and lines["images"].tolist() == [4, 2, 2]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["images"] == 4 and len(summary["lines"]) == 6
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["rewards"].keys() == {"hps", "geneval"}
    assert manifest["rewards"]["geneval"]["version"] == "swin-s"


def test_scores_by_id_stand_beside_those_of_rewards(
    geneval: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, values = ("00002_x", "00001", "00000_9", "00000_10"), (0.1, 1 / 3, -2e-9, 7)
    frame = pd.DataFrame({"ID": names, "Mine": values, "path": "ignored"})
    frame[["ID", "Mine"]].to_csv(geneval / "mine.csv", index=False)
    images = [geneval / "images", "--prompts", geneval / "geneval.jsonl"]
    out = ["--output", geneval / "scores"]
    own = ["--column", "mine", "--reward", "mine", "--version", "1"]
    taken = ["import-scores", geneval / "mine.csv", "--images", *images, *own, *out]
    for command in (taken, taken, ["score", *images, *SCORE, *out]):
        succeeded(tell(capsys, *command))
    scores = pd.read_parquet(geneval / "scores" / "scores.parquet").set_index("reward")
    assert dict(zip(scores.loc["mine", "id"], scores.loc["mine", "score"], strict=True)) == dict(
        zip(names, values, strict=True)
    )
    assert len(scores) == 8 and len(scores.loc["hps"]) == 4


def imported(
    geneval: Path, capsys: pytest.CaptureFixture[str], *values: object, reward: str = "mine"
) -> list[object]:
    """Imports scores of all images; the arguments of scoring beside them."""
    names = ("00000_10", "00000_9", "00001", "00002_x")
    rows = (f"{name},{value}\n" for name, value in zip(names, values, strict=True))
    (geneval / "mine.csv").write_text("".join(["id,score\n", *rows]))
    images = [geneval / "images", "--prompts", geneval / "geneval.jsonl"]
    out = ["--output", geneval / "scores"]
    own = ["--images", *images, "--reward", reward, "--version", "1", *out]
    succeeded(tell(capsys, "import-scores", geneval / "mine.csv", *own))
    return [*images, "--profile", "mini", *out]


def rewards_in(folder: Path) -> list[str]:
    return sorted(pd.read_parquet(folder / "scores" / "scores.parquet")["reward"].unique())


def test_a_command_killed_while_it_writes_is_repeated(
    geneval: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    score = imported(geneval, capsys, 1, 2, 3, 4)
    for name in ("scores.csv", "skipped.csv"):

        def killed(path: Path, text: str, at: str = name) -> None:
            if path.name == at:
                raise KeyboardInterrupt
            atomic_write_text(path, text)

        with monkeypatch.context() as patch:
            patch.setattr(score_folder, "atomic_write_text", killed)
            tell(capsys, "score", *score, "--rewards", "hps")
        succeeded(tell(capsys, "score", *score, "--rewards", "hps"))
        assert rewards_in(geneval) == ["hps", "mine"]
    manifest = json.loads((geneval / "scores" / "manifest.json").read_text())
    assert manifest["rewards"]["mine"]["version"] == "1"


def test_scores_added_by_another_command_meanwhile_are_kept(
    geneval: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any) -> BatchedReward:
        imported(geneval, capsys, 1, 2, 3, 4)
        return load_reward(*arguments)

    images = [geneval / "images", "--prompts", geneval / "geneval.jsonl"]
    monkeypatch.setattr(score_folder, "load_reward", load)
    succeeded(tell(capsys, "score", *images, *SCORE, "--output", geneval / "scores"))
    assert rewards_in(geneval) == ["hps", "mine"]


def test_scoring_does_not_lose_imported_scores(
    geneval: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    score = imported(geneval, capsys, 1, 2, 3, 4, reward="hps")
    monkeypatch.setattr(score_folder, "load_reward", None)  # refused before anything is loaded
    errors = refused(tell(capsys, "score", *score, "--rewards", "clip,hps"))
    assert "has imported scores of hps, which would be lost; choose another --output" in errors
    Image.new("RGB", (8, 8), "white").save(geneval / "images" / "00001.png")
    errors = refused(tell(capsys, "score", *score, "--rewards", "clip"))
    assert "has imported scores of hps, which would be lost" in errors


@pytest.mark.parametrize("value", ["1e308", "-4e38", "1_0", "\u0663", "nan", "0x1"])
def test_what_is_no_32_bit_number_is_refused(
    geneval: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    imported(geneval, capsys, 1, "2.", ".5", " 1e-3 ")
    before = (geneval / "scores" / "scores.csv").read_bytes()
    file = geneval / "mine.csv"
    file.write_text(file.read_text().replace("00001,.5", f"00001,{value}"))
    images = ["--images", geneval / "images", "--prompts", geneval / "geneval.jsonl"]
    options = ["--reward", "mine", "--version", "1", "--output", geneval / "scores"]
    errors = refused(tell(capsys, "import-scores", file, *images, *options))
    assert f"00001: mine.csv, line 4: {value!r} is not a finite 32-bit number" in errors
    assert (geneval / "scores" / "scores.csv").read_bytes() == before


def test_a_cells_evaluation_is_laid_out(geneval: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = geneval / "images" / "images", geneval / "images" / "diversity"
    for folder in cell:
        folder.mkdir()
    for path in sorted((geneval / "images").glob("*.png")):
        path.rename(cell["_" in path.name] / path.name)
    for number in (0, 2):
        shades = Image.new("RGB", (8, 8), (100 + number, 0, 0))
        shades.save(cell[0] / f"{number:05d}.png")
    out = succeeded(export(capsys, geneval))
    assert "6 images of 3 prompts" in out
    names = [row["filename"].partition("laid out/")[2] for row in evaluate(geneval / "laid out")]
    assert sorted(names) == [
        *(f"00000/samples/000{index}.png" for index in range(3)),
        "00001/samples/0000.png",
        *(f"00002/samples/000{index}.png" for index in range(2)),
    ]
    rows = (geneval / "laid out" / "manifest.jsonl").read_text().splitlines()
    ids = [json.loads(row)["id"] for row in rows]
    assert ids[:3] == ["images/00000", "diversity/00000_9", "diversity/00000_10"]


def test_an_absent_file_is_one_line(geneval: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = geneval / "nowhere.jsonl"
    errors = refused(export(capsys, geneval, "--prompts", nowhere))
    assert f"{nowhere}: no such file; run `g2rpo prompts fetch geneval`" in errors
    options = ["--images", geneval, "--reward", "mine", "--version", "1"]
    errors = refused(tell(capsys, "import-scores", nowhere, *options))
    assert f"{nowhere}: no such file; correct the path" in errors


def test_what_the_evaluator_would_misread_is_refused(
    geneval: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = geneval / "images"
    (images / "00002_x.png").rename(images / "00007.png")
    errors = refused(export(capsys, geneval))
    assert (
        "1 image and 1 prompt cannot be exported: 00007: no prompt has this name as its id"
        in errors
    )
    assert "00002: prompt without an image in the folder" in errors and "--skip-bad" in errors
    Image.new("RGBA", (8, 8)).save(images / "00001_a.png")
    Image.new("RGB", (8, 8)).save(images / "00001_b.png", "JPEG")
    (images / "00001_c.png").write_bytes((images / "00001.png").read_bytes()[:50])
    Image.new("I;16", (8, 8)).save(images / "00001_d.png")
    out = succeeded(export(capsys, geneval, "--skip-bad"))
    assert "3 images of 2 prompts" in out
    reasons = dict(
        line.removeprefix("skipped ").split(": ", 1)
        for line in out.splitlines()
        if line.startswith("skipped ")
    )
    assert reasons.keys() == {"00007", "00002", "00001_a", "00001_b", "00001_c", "00001_d"}
    assert reasons["00001_a"].startswith("RGBA with transparency")
    assert reasons["00001_b"].startswith("a JPEG file, which the evaluator skips")
    assert sorted(path.name for path in (geneval / "laid out").iterdir()) == [
        *("00000", "00001", "manifest.jsonl"),
    ]
    errors = refused(export(capsys, geneval))
    assert "laid out: already exists" in errors
    (geneval / "geneval.jsonl").write_text('{"prompt": "a", "id": "00000"}\n')
    errors = refused(export(capsys, geneval, "--output", geneval / "other"))
    assert "line 1: not a prompt of GenEval, without tag and include" in errors
    assert not (geneval / "other").exists()


def test_scores_that_do_not_fit_are_listed(
    geneval: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = geneval / "geneval.jsonl", geneval / "scores"
    lines = [
        '{"image": "elsewhere/00000_9.png", "score": 0.5}',
        '{"image": "00000_10.png", "score": NaN}',
        '{"image": "00001.png", "score": "high"}',
        '{"image": "00001.png", "score": 1}',
        '{"image": "strange.png", "score": 1}',
        '{"image": "00000_9.png", "prompt": "another", "score": 1}',
    ]
    file = geneval / "results.jsonl"
    file.write_text("\n".join(lines))
    base = [file, "--images", geneval / "images", "--prompts", prompts, "--reward", "mine"]
    command = ["import-scores", *base, "--version", "1", "--output", output]
    errors = refused(tell(capsys, *command))
    assert (
        "5 scores cannot be imported: strange.png: results.jsonl, line 5: is not an image" in errors
    )
    assert "00000_10: results.jsonl, line 2: nan is not a finite 32-bit number" in errors
    assert "00001: 2 scores in results.jsonl: line 3, line 4" in errors
    assert "00000_9.png: results.jsonl, line 6: it has another prompt" in errors
    assert "00002_x: no score in results.jsonl" in errors
    assert not (output / "scores.parquet").exists()
    file.write_text("\n".join([*lines, '{"image": "00001.png", "score": ', "[1]"]))
    errors = refused(tell(capsys, *command))
    assert "7 scores cannot be imported: line 7: results.jsonl, line 7: not valid JSON (" in errors
    assert "line 8: results.jsonl, line 8: expected an object" in errors
    out = succeeded(tell(capsys, *command, "--skip-bad"))
    assert out.splitlines()[-1].startswith("scored 1 of 8; 7 skipped: line 7: results.jsonl, l")
    assert len(pd.read_csv(output / "skipped.csv")) == 7
    # Another file has no score of that image.
    known = (output / "scores.parquet").read_bytes()
    file.write_text('{"image": "00000_10.png", "score": 0.25}')
    errors = refused(tell(capsys, *command, "--skip-bad"))
    assert "has scores of 'mine', version '1', of which 1 would be lost, the first of 00" in errors
    assert (output / "scores.parquet").read_bytes() == known
    file.write_text("\n".join(lines))
    # What was scored before is not lost.
    succeeded(tell(capsys, "score", geneval / "images", "--prompts", prompts, *SCORE))
    whole = geneval / "images-scores"
    known = (whole / "scores.parquet").read_bytes()
    command = ["import-scores", *base, "--version", "1", "--output", whole, "--skip-bad"]
    errors = refused(tell(capsys, *command))
    assert "has scores of hps for other images or prompts; choose" in errors
    errors = refused(tell(capsys, *command, "--reward", "hps"))
    assert "has scores of 'hps', version " in errors and "would be lost" in errors
    assert (whole / "scores.parquet").read_bytes() == known
    other = geneval / "other.csv"
    for text, message in (
        ("", "other.csv: the file is empty"),
        ("id,mark\n1,2\n", "no column 'score'"),
    ):
        other.write_text(text)
        errors = refused(tell(capsys, "import-scores", other, *base[1:], "--version", "1"))
        assert message in errors


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says that it is large, with hardly any pixels."""
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + bytes(8)]
    chunks = (
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


ODD = ("صورة", "日本語の絵", "cafe\u0301", "a b", "=1+1", "ꦄ🚀")


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, str]:
    """Fifty images of a set, and what is wrong with other files of the folder, by its name."""
    folder, rows = tmp_path / "images", []
    folder.mkdir()
    draws = np.random.default_rng(0)
    names = [*(f"p{number:03d}" for number in range(50 - len(ODD))), *ODD]
    for name, caption in zip(names, world.make_captions(3, "test", 50), strict=True):
        rows.append({"id": name, "prompt": caption})
        pixels = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    pd.DataFrame(rows).to_csv(tmp_path / "set.csv", index=False)
    frames = [Image.new("RGB", (8, 8), shade) for shade in ("red", "blue")]
    frames[0].save(folder / "p000_animated.gif", save_all=True, append_images=frames[1:])
    whole = (folder / "p001.png").read_bytes()
    for name, data in {
        "p001_broken": whole[:60] + b"\0" * 9 + whole[69:],
        "p001_truncated": whole[:-30],
        "p001_huge": png_of_size(40_000, 40_000),
        "p001_text": b"this is no image",
        "p001_empty": b"",
        "p003_locked": whole,
    }.items():
        (folder / f"{name}.png").write_bytes(data)
    (folder / "p002_loop.png").symlink_to("p002_pool.png")
    (folder / "p002_pool.png").symlink_to("p002_loop.png")
    (folder / "round").symlink_to(folder)
    (folder / "p003_locked.png").chmod(0)
    reasons = {
        "p002_loop.png": "Too many levels of symbolic links",
        "p002_pool.png": "Too many levels of symbolic links",
        "p001_broken": "broken data stream",
        "p001_truncated": "truncated",
        "p001_huge": "more than 179 megapixels, which is the limit",
        "p001_text": "not a readable image (empty, or of an unknown format",
        "p001_empty": "not a readable image (empty, or of an unknown format",
    }
    if not os.access(folder / "p003_locked.png", os.R_OK):  # root reads everything
        reasons["p003_locked"] = "Permission denied"
    return reasons


def test_bad_files_among_many_are_named_and_the_rest_is_scored(
    hostile: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    options = ["--prompts", tmp_path / "set.csv", "--profile", "mini", "--output", output]
    command = ["score", tmp_path / "images", *options, "--rewards"]
    errors = refused(tell(capsys, *command, "hps"))
    assert "2 images cannot be scored: p002_loop.png, p002_pool.png: cannot be read" in errors
    assert "--skip-bad" in errors
    out = succeeded(tell(capsys, *command, "hps", "--skip-bad"))
    skipped = pd.read_csv(output / "skipped.csv").set_index("item")["reason"]
    assert {name: reason for name, reason in hostile.items() if reason in skipped[name]} == hostile
    scores = pd.read_parquet(output / "scores.parquet")
    scored, bad = 51 + (len(hostile) == 7), len(hostile)
    assert scores["id"].nunique() == len(scores) == scored and len(skipped) == bad
    assert {*ODD, "p000_animated"} <= set(scores["id"]) and np.isfinite(scores["score"]).all()
    assert f"scored {scored} of {scored + bad}; {bad} skipped: p002_loop.png, " in out
    counts = json.loads((output / "summary.json").read_text())
    assert (counts["images"], counts["skipped"]) == (scored, bad)
    assert counts["lines"][0]["prompts"] == 50
    text = (output / "scores.csv").read_bytes().decode()
    assert all(f'"{name}"' in text for name in ODD)
    # Another reward's scores are added, and those of the first are kept.
    succeeded(tell(capsys, *command, "clip", "--skip-bad"))
    again = pd.read_parquet(output / "scores.parquet")
    assert again.groupby("reward").size().to_dict() == {"hps": scored, "clip": scored}
    kept = again[again["reward"] == "hps"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, scores)
