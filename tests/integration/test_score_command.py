"""``g2rpo score`` as a user runs it, with the mini world's reward models."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from command_line import refused, succeeded, told_here
from forked import Command
from PIL import Image
from small_aesthetic import build_small_aesthetic
from small_vlm import build_small_hpsv3, build_small_vlm

from benchmarks.mini_world import world
from g2rpo.data.images import load_image
from g2rpo.rewards.registry import load_reward
from g2rpo.seeds import generator
from reproduce.experiment import ROOT, load_profile, reward_configs

SCORE = ["-m", "reproduce.cli", "score"]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures of the mini world, of several sizes and kinds, and their prompt set."""
    folder = tmp_path_factory.mktemp("gallery")
    captions = world.make_captions(3, "test", 20)
    rng = generator(3, "gallery")
    rows = []
    for number, caption in enumerate(captions):
        rows.append({"id": f"q{number}", "prompt": caption, "style": "ab"[number % 2]})
        for copy in range(2):
            picture = Image.fromarray(world.render(world.scene_of(caption), rng))
            kind = (number + copy) % 3
            if kind == 1:
                picture = picture.resize((96, 64))
            path = folder / f"q{number}_{copy}.{'png' if kind else 'webp'}"
            picture.save(path)
    pd.DataFrame(rows).to_csv(folder / "set.csv", index=False)
    return folder


def score_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The command in this process, which saves the imports: exit code, output, errors."""
    return told_here(capsys, Path.cwd(), "score", *arguments)


def test_a_folder_is_scored_as_its_rewards_score_it(
    gallery: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--prompts", gallery / "set.csv", "--profile", "mini", "--output", tmp_path / "out"]
    arguments = map(str, (gallery, *options, "--rewards", "hps,attributes"))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, *SCORE, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert len(scores) == 80
    ranks = {path.name.split("-")[-1] for path in (tmp_path / "out" / "journal").iterdir()}
    assert ranks == {"rank0.jsonl", "rank1.jsonl"}
    prompts = pd.read_csv(gallery / "set.csv").set_index("id")["prompt"]
    hps = load_reward(reward_configs(load_profile("mini"))["hps"], "cpu")
    own = scores[scores["reward"] == "hps"].set_index("id")
    assert set(own["weights_hash"]) == {hps.weights_hash}
    for path in sorted(gallery.glob("q1*_*")):
        alone = hps.score([load_image(path).pixels], [prompts[path.stem.split("_")[0]]])
        found = torch.tensor(own.loc[path.stem, "score"])
        torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=0)
    table = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert list(table["style"].fillna("")) == ["", "a", "b"] * 2
    assert (table["low"] <= table["mean"]).all()
    assert set(table["interval"]) == {"checkpoint"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["images"] == 40
    assert manifest["provenance"]["weights"]["hps"] == hps.weights_hash
    assert "95 % interval" in done.stdout
    # Another reward is added; those that are scored are not scored again.
    before = {path.name: path.stat().st_size for path in (tmp_path / "out/journal").iterdir()}
    succeeded(score_here(capsys, gallery, *options, "--rewards", "hps,clip"))
    after = {path.name: path.stat().st_size for path in (tmp_path / "out/journal").iterdir()}
    assert before.items() <= after.items()
    again = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    for reward in ("hps", "attributes"):
        one, two = (
            frame[frame["reward"] == reward].reset_index(drop=True) for frame in (again, scores)
        )
        pd.testing.assert_frame_equal(one, two)
    assert (again["reward"] == "clip").sum() == 40
    # Styles that were changed meanwhile are those of all rewards.
    changed = pd.read_csv(gallery / "set.csv").assign(style="one")
    changed.to_csv(tmp_path / "changed.csv", index=False)
    options[1] = tmp_path / "changed.csv"
    succeeded(score_here(capsys, gallery, *options, "--rewards", "hps"))
    again = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert set(again["reward"]) == {"hps", "clip", "attributes"}
    assert set(again["style"]) == {"one"}


@pytest.mark.usefixtures("small_hpsv3_images")
def test_rewards_that_the_profile_does_not_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, size in {"wide": (90, 30), "tall": (40, 64)}.items():
        Image.new("RGB", size, "red").save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(f"a {name} red picture")
    sources = {
        "hpsv3": build_small_hpsv3(tmp_path / "hpsv3"),
        "aesthetic": build_small_aesthetic(tmp_path / "aesthetic"),
        "vqa_score": build_small_vlm(tmp_path / "vlm"),
    }
    changes = [part for name, at in sources.items() for part in ("-s", f"{name}.source={at}")]
    options = ["--rewards", ",".join(sources), "--output", tmp_path / "out", *changes]
    succeeded(score_here(capsys, images, *options))
    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert scores.groupby("reward")["version"].agg("unique").map(list).to_dict() == {
        "hpsv3": ["v3-bfloat16"],
        "aesthetic": ["sac+logos+ava1-l14-linearMSE"],
        "vqa_score": ["vlm-yes"],
    }
    assert scores["score"].notna().all() and len(scores) == 6
    asked = scores[scores["reward"] != "aesthetic"]
    assert asked["template_hash"].str.len().eq(64).all()
    assert scores["weights_hash"].nunique() == 3
    errors = refused(score_here(capsys, images, "--rewards", "hpsv4"))
    assert "profile flux has no reward 'hpsv4'; did you mean 'hpsv3'" in errors


def test_an_image_too_wide_for_the_model_is_named_or_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, vlm = tmp_path / "images", build_small_vlm(tmp_path / "vlm")
    images.mkdir()
    for name, size in {"wide": (402, 2), "just": (400, 2), "tall": (1, 300)}.items():
        Image.new("RGB", size, "red").save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(f"a {name} red picture")
    options = [images, "--output", tmp_path / "out", "--profile", "mini", "--rewards"]
    vqa = ["vqa_score", "-s", f"vqa_score.source={vlm}"]
    errors = refused(score_here(capsys, *options, *vqa))
    assert "2 images cannot be scored" in errors and "--skip-bad" in errors
    assert "wide.png: 402 x 2 pixels, one side more than 200 times the other" in errors
    succeeded(score_here(capsys, *options, *vqa, "--skip-bad"))
    assert pd.read_parquet(tmp_path / "out" / "scores.parquet")["id"].tolist() == ["just"]
    skipped = pd.read_csv(tmp_path / "out" / "skipped.csv")
    assert sorted(skipped["item"]) == ["tall", "wide"]
    succeeded(score_here(capsys, *options, "hps"))
    assert len(pd.read_parquet(tmp_path / "out" / "scores.parquet")) == 3


def test_another_preprocessing_scores_again(
    gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "hps"
    shutil.copytree(ROOT / "benchmarks/mini_world/assets/rewards/hps", model)
    options = ["--prompts", gallery / "set.csv", "--profile", "mini", "--rewards", "hps"]

    def scores(output: str) -> list[float]:
        changed = ["-s", f"hps.source={model}", "--output", tmp_path / output]
        succeeded(score_here(capsys, gallery, *options, *changed))
        return pd.read_parquet(tmp_path / output / "scores.parquet")["score"].tolist()

    before = scores("one")
    config = json.loads((model / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= {"mean": [0, 0, 0], "std": [1, 1, 1]}
    (model / "open_clip_config.json").write_text(json.dumps(config))
    after = scores("one")
    assert after == scores("fresh") != before
    assert scores("one") == after


def test_a_killed_run_resumes(
    gallery: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [
        *(gallery, "--prompts", gallery / "set.csv", "--profile", "mini"),
        *("--rewards", "pick_score", "--batch-size", 1),
    ]
    output = tmp_path / "killed"
    command = Command(tmp_path, "score", *map(str, options), "--output", str(output))
    deadline = time.monotonic() + 600
    journals = (output / "journal").glob
    while not any(path.stat().st_size for path in journals("*.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    command.kill()
    (journal,) = (output / "journal").iterdir()
    lines = journal.read_bytes().count(b"\n")
    assert 1 <= lines < 40
    succeeded(score_here(capsys, *options, "--output", output))
    assert journal.read_bytes().count(b"\n") == 40
    succeeded(score_here(capsys, *options, "--output", tmp_path / "whole"))
    pd.testing.assert_frame_equal(
        pd.read_parquet(output / "scores.parquet"),
        pd.read_parquet(tmp_path / "whole" / "scores.parquet"),
    )


def test_mistakes_are_one_line(
    gallery: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--profile", "mini", "--output", tmp_path / "out", "--rewards"]
    for arguments, message in (
        ([tmp_path / "nowhere", *options, "hps"], "no such folder of images or manifest"),
        (["nowhere", "--profile", "mini"], "no such folder of images or manifest"),
        (["", "--profile", "mini"], "SOURCE is empty"),
        ([gallery, *options, "hsp"], "did you mean 'hps'"),
        ([gallery, *options, "hps"], "--prompts"),
    ):
        code, _, errors = score_here(capsys, *arguments)
        assert code == 2
        assert errors.strip().splitlines()[-1].startswith("error: ")
        assert message in errors
    assert not list(Path().glob("nowhere*"))
    broken = tmp_path / "gallery"
    broken.mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (32, 32)).save(broken / f"{name}.png")
        (broken / f"{name}.txt").write_text("a red circle on black")
    (broken / "two.png").write_bytes((broken / "two.png").read_bytes()[:60])
    code, _, errors = score_here(capsys, broken, *options, "attributes")
    assert code == 2
    assert "two.png" in errors
    (tmp_path / "file").write_text("in the way")
    for changes, message in (
        (["-s", "pick_score=logit"], "not among the rewards"),
        (["-s", "attributes=logit"], "expected a setting of the reward"),
        (["-s", "attributes.model=hps"], "expected a setting of the reward"),
        (["-s", "attributes.batch_sise=3"], "batch_size"),
        (["--output", tmp_path / "file"], "cannot be written"),
        (["--rewards", ","], "--rewards is empty"),
    ):
        code, _, errors = score_here(capsys, broken, *options, "attributes", "--skip-bad", *changes)
        assert code == 2, changes
        assert message in errors.strip().splitlines()[-1]
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")).mkdir()
    (tmp_path / "other").mkdir()
    pd.DataFrame({"reward": ["hps"], "score": [0.5]}).to_parquet(tmp_path / "other/scores.parquet")
    for output, message in (
        (os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9/out"), "path is not UTF-8"),
        (tmp_path / "other", "not written by `g2rpo score`; choose another --output"),
    ):
        code, _, errors = score_here(
            capsys, broken, *options, "attributes", "--skip-bad", "--output", output
        )
        assert code == 2
        assert message in errors.strip().splitlines()[-1]
    errors = refused(score_here(capsys, "table1", "base", "--rewards", "hps"))
    assert "--rewards applies to a folder" in errors
    printed = succeeded(score_here(capsys, broken, *options, "attributes", "--skip-bad"))
    assert "skipped two: " in printed
    assert list(pd.read_csv(tmp_path / "out" / "skipped.csv")["item"]) == ["two"]
    assert list(pd.read_parquet(tmp_path / "out" / "scores.parquet")["id"]) == ["one"]


def test_rows_that_cannot_be_read_and_prompts_that_cannot_be_scored_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "odd"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{name}.png")
    good, odd = '"good.png","a red circle on black"', 'odd.png,"a red unicorn on black"'
    table = "\n".join(["image,prompt", good, "odd.png", odd])
    objects = [{"image": "good.png", "prompt": "a red circle on black"}, "odd.png"]
    objects.append({"image": "odd.png", "prompt": "a red unicorn on black"})
    texts = {
        "set.csv": table,
        "set.jsonl": "\n".join(map(json.dumps, objects)),
        "set.json": json.dumps(objects),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        output = tmp_path / f"{name}-scores"
        options = ["--profile", "mini", "--rewards", "attributes", "--output", output]
        errors = refused(score_here(capsys, tmp_path / name, *options))
        assert errors.count("\n") <= 2 and "1 image cannot be scored" in errors
        reason = "1 values, but the header has 2" if name == "set.csv" else "expected an object"
        assert reason in errors
        printed = succeeded(score_here(capsys, tmp_path / name, *options, "--skip-bad"))
        assert printed.splitlines()[-1].startswith("scored 1 of 3; 2 skipped: ")
        assert "odd: attributes: caption 'a red unicorn on black': 'unicorn' is not in" in printed
        assert list(pd.read_parquet(output / "scores.parquet")["id"]) == ["good"]


def test_everything_found_is_scored_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    places = [folder / "0.png", folder / "1.jp2", folder / "2", elsewhere / "3.tga"]
    captions = world.make_captions(3, "test", len(places))
    for place, caption in zip(places, captions, strict=True):
        place.parent.mkdir(exist_ok=True)
        picture = Image.fromarray(world.render(world.scene_of(caption), generator(3, "picture")))
        picture.save(place, {".jp2": "JPEG2000", ".tga": "TGA"}.get(place.suffix, "PNG"))
        place.with_suffix(".txt").write_text(caption)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "5.txt").write_text(captions[0])
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    options = ["--profile", "mini", "--rewards", "hps", "--output", tmp_path / "out"]
    errors = refused(score_here(capsys, folder, *options))
    assert (
        "1 caption and 1 image cannot be scored: 5.txt: caption without a readable image" in errors
    )
    assert "gone: broken link to" in errors and "--skip-bad" in errors
    printed = succeeded(score_here(capsys, folder, *options, "--skip-bad"))
    assert printed.splitlines()[-1].startswith("scored 4 of 6; 2 skipped: 5.txt: caption ")
    assert list(pd.read_csv(tmp_path / "out" / "skipped.csv")["item"]) == ["5.txt", "gone"]
    scores = pd.read_parquet(tmp_path / "out" / "scores.parquet").set_index("image")["score"]
    assert list(scores.index) == ["0.png", "1.jp2", "2", "linked/3.tga"]
    # The same as a manifest, with one more column of prompts.
    rows = pd.DataFrame({"image": scores.index, "prompt": captions, "text": captions, "seed": 1})
    rows.to_csv(folder / "set.csv", index=False, sep=";", encoding="utf-16")
    printed = succeeded(score_here(capsys, folder / "set.csv", *options))
    assert "reading images from 'image' and prompts from 'prompt'; ignoring 'text', 's" in printed
    assert printed.splitlines()[-1] == "scored 4 of 4"
    again = pd.read_parquet(tmp_path / "out" / "scores.parquet").set_index("image")["score"]
    pd.testing.assert_series_equal(again, scores, rtol=1e-5)
    rows["text"] = captions[::-1]
    rows.to_csv(folder / "set.csv", index=False)
    errors = refused(score_here(capsys, folder / "set.csv", *options))
    assert "set.csv, line 2: the columns 'prompt' and 'text' differ" in errors


def test_the_readmes_gallery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last two pictures contradict their captions, and no other does."""
    options = ["--profile", "mini", "--rewards", "attributes", "--output", tmp_path]
    succeeded(score_here(capsys, ROOT / "docs" / "gallery", *options))
    scores = pd.read_parquet(tmp_path / "scores.parquet")["score"]
    assert list(scores == 1) == [True] * 6 + [False] * 2
