"""The report: what goes into the page, from made-up results with texts that try to break out."""

import base64
import hashlib
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_results import HOSTILE_LABEL, ITERATIONS, PROMPTS, ROWS, Results, make_results
from typer.testing import CliRunner

from g2rpo.errors import UserError
from reproduce.cli import app
from reproduce.experiment import ROOT, load_profile
from reproduce.experiment.layout import Layout
from reproduce.report.chapter import Chapter, load_chapter
from reproduce.report.configurations import configuration_data
from reproduce.report.curves import AXES, curve_data
from reproduce.report.documents import find_documents
from reproduce.report.grids import Grid
from reproduce.report.images import Fitter
from reproduce.report.overview import overview_grid, provenance_grid
from reproduce.report.page import make_page, script_json, view_of
from reproduce.report.pictures import Amount, gather_pictures, picture_data, reduced
from reproduce.report.table_grids import phase_seconds
from reproduce.tables.figures import Metric, seed_band


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, smoke_assets: Path) -> Results:
    return make_results(tmp_path_factory.mktemp("report"), smoke_assets)


@pytest.fixture(scope="module")
def chapter(results: Results) -> Chapter:
    return results.chapter()


@pytest.fixture(scope="module")
def html(results: Results, chapter: Chapter) -> str:
    return make_page(results.loaded, [chapter]).html


class Parsed(HTMLParser):
    """What a browser finds: elements, the contents of scripts, ids, and text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
            if tag == "script":
                self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data


def embedded(html: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Parsed(html).scripts[0])
    return found


def test_json_in_a_script_cannot_end_it() -> None:
    hostile = {"a": "</script><!-- <script> &amp; \u2028 \u2029 \\", "b": [1.5, None, "🟦"]}
    text = str(script_json(hostile))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == hostile


def test_hostile_texts_stay_texts(html: str) -> None:
    page = Parsed(html)
    assert len(page.scripts) == 3
    assert [tag for tag, _ in page.tags].count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    shown = embedded(html)["chapters"]["made-up"]["pictures"]["prompts"]
    assert [prompt["text"] for prompt in shown] == list(PROMPTS)
    assert HOSTILE_LABEL in page.text
    assert "Scores of nothing & nobody" in page.text


def test_the_page_asks_nothing_of_a_network_and_runs_its_own_script_alone(html: str) -> None:
    page = Parsed(html)
    loads = [a for _, a in page.tags for name in ("src", "href") if (a.get(name) or "#")[0] != "#"]
    assert [a["href"] for a in loads] == ["data:,"]
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert str(ROOT) not in html


def test_what_is_missing_is_shown_with_its_reason(chapter: Chapter, html: str) -> None:
    assert {(gap.row, gap.seed) for gap in chapter.gaps} == {
        ("hps/mix_grpo", 1), ("hps/mix_grpo", 2), ("hps/mix_grpo", 3), ("hps/flow_grpo", 3),
    }  # fmt: skip
    text = Parsed(html).text
    assert "4 runs are missing" in text
    assert "MixGRPO (HPS), seed 1: train has not run" in text
    assert "missing: train has not run" in text
    assert f"{HOSTILE_LABEL} (HPS): seed 3 is missing (train has not run)." in text


def signs(grid: Grid) -> list[list[tuple[str, str]]]:
    """The signs of each row, without those of rewards that it was trained on."""
    return [[note for box in row for note in box.notes if note[0] != "†"] for row in grid.rows]


def test_significant_differences_have_a_mark_with_its_evidence(chapter: Chapter) -> None:
    base, *_, focus = signs(view_of(chapter)["scores"])
    assert base == []
    sign, sentence = focus[0]
    assert sign == "▲"
    assert "+0.029 vs. Base, 95% interval +0.023 to +0.035 (method)" in sentence


def test_curves_are_means_and_bands_over_seeds(chapter: Chapter) -> None:
    data = curve_data(chapter)
    assert data is not None
    assert [metric["key"] for metric in data["metrics"]] == ["validation/hps", "reward/hps/mean"]
    assert [axis["key"] for axis in data["axes"]] == list(AXES)
    (group,) = data["groups"]
    lines = {line["label"]: line for line in group["lines"]}
    assert list(lines) == ["DanceGRPO", HOSTILE_LABEL, "G²RPO"]
    runs = [c.curve for c in chapter.cells if c.info.row == "hps/g2rpo" and c.curve is not None]
    band = seed_band(runs, Metric("validation/hps", ""), "seconds")
    assert band is not None and band.low is not None and band.high is not None
    series = lines["G²RPO"]["series"]["validation/hps"]
    np.testing.assert_allclose(series["y"], band.mean, rtol=1e-5)
    np.testing.assert_allclose(series["low"], band.low, rtol=1e-5)
    np.testing.assert_allclose(series["high"], band.high, rtol=1e-5)
    assert series["x"]["seconds"] == [2.0 * step for step in range(ITERATIONS + 1)]
    assert series["x"]["rollout_evaluations"][-1] == 1000 * ITERATIONS
    assert lines[HOSTILE_LABEL]["seeds"] == 2
    assert "low" not in lines[HOSTILE_LABEL]["series"]["validation/hps"]


def test_seconds_by_phase_add_up(chapter: Chapter) -> None:
    cell = next(cell for cell in chapter.cells if cell.info.seed is not None)
    seconds = phase_seconds(cell)
    assert seconds is not None
    assert seconds == pytest.approx({"sampling": 6.0, "scoring": 3.0, "training": 1.5, "rest": 1.5})
    assert cell.curve is not None
    bare = cell.curve.drop(columns="seconds/scoring")
    assert phase_seconds(type(cell)(cell.info, cell.scores, bare)) is None
    phases = view_of(chapter)["phases"]
    assert len(phases.rows) == len(ROWS)
    parts = phases.rows[0][-1].shares
    assert sum(share for _, share in parts) == pytest.approx(1.0)


def pixels(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def test_images_are_the_files_pixels_from_base_to_end(chapter: Chapter, html: str) -> None:
    gallery = gather_pictures(chapter)
    assert gallery.between == [2, 4]
    data = embedded(html)["chapters"]["made-up"]["pictures"]
    images = json.loads(Parsed(html).scripts[1])
    assert data["positions"] == [0, 2, 4, ITERATIONS]
    assert data["seeds"] == [1, 2, 3]
    first = gallery.prompts[0].id
    (base,) = [tile for tile in data["tiles"] if tile["label"] == "Base"]
    tile = next(t for t in data["tiles"] if t["label"] == "G²RPO" and t["seed"] == 2)
    assert [frame["at"] for frame in tile["frames"]] == [0, 2, 4, ITERATIONS]
    # Before the first iteration a row is its base, which is kept once for all rows and seeds.
    assert tile["frames"][0]["images"] == base["frames"][0]["images"]
    files = {s.at: s for s in gallery.shots
             if (s.row.label, s.seed, s.prompt.id) == ("G²RPO", 2, first)}  # fmt: skip
    for shown in tile["frames"]:
        shot = files[shown["at"]]
        theirs = np.array(Image.open(shot.path))
        assert (pixels(images[shown["images"][first]]) == theirs).all()
        assert shown["scores"][first]["hps"] == pytest.approx(shot.scores["hps"], abs=1e-5)
    assert len(tile["frames"][1]["images"]) == 4
    assert len(set(images.values())) == len(images) == 6 + 8 * 6 + 8 * 2 * 4


def test_a_gallery_is_reduced_evenly_and_keeps_its_ends(chapter: Chapter) -> None:
    gallery = gather_pictures(chapter)
    part = reduced(gallery, Amount(None, 2, seeds=1, between=1))
    assert part.prompts == gallery.prompts[:2]
    assert part.seeds == [1]
    assert {shot.at for shot in part.shots if shot.seed is not None} == {0, 2, ITERATIONS}
    assert {shot.prompt for shot in part.shots} == set(gallery.prompts[:2])
    assert reduced(gallery, Amount(None, 2, between=0)).between == []


def test_runs_of_different_lengths_share_the_moments_that_were_kept(chapter: Chapter) -> None:
    gallery = gather_pictures(chapter)
    shots = [
        replace(shot, end=5, at=5 if shot.at == ITERATIONS else shot.at)
        if shot.row.label == "DanceGRPO"
        else shot
        for shot in gallery.shots
    ]
    shorter = replace(gallery, shots=tuple(shots))
    data = picture_data(chapter, shorter, {shot.path: "x" for shot in shots})
    assert data is not None
    assert data["positions"] == [0, 2, 4, ITERATIONS]
    assert {tile["end"] for tile in data["tiles"]} == {None, 5, ITERATIONS}


def test_a_declared_figure_is_shown_once_it_is_drawn(chapter: Chapter) -> None:
    table = chapter.experiment.table.model_copy(update={"figures": ("frontier",)})
    declared = chapter.experiment.model_copy(update={"table": table})
    path = chapter.layout.experiment(chapter.profile.name, chapter.name) / "frontier.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (10, 20, 30)).save(path)
    drawn, chapters = path.read_bytes(), [replace(chapter, experiment=declared)]
    assert base64.b64encode(drawn).decode() in make_page(chapter.profile, chapters).html
    path.unlink()
    assert "Figure: validation rewards" not in make_page(chapter.profile, chapters).html


def test_what_does_not_fit_is_omitted_with_a_note(results: Results, chapter: Chapter) -> None:
    whole = make_page(results.loaded, [chapter])
    assert whole.notes == ()
    bare = len(make_page(results.loaded, [chapter], 10**9).html.encode())
    gallery = gather_pictures(chapter)
    used = sum(len(uri) for uri in Fitter([gallery])(10**9).uris.values())
    limit = bare - used // 2
    page = make_page(results.loaded, [chapter], limit)
    assert len(page.html.encode()) <= limit
    (note,) = page.notes
    assert "one training seed" in note
    assert note in Parsed(page.html).text
    none = make_page(results.loaded, [chapter], bare - used)
    assert len(none.html.encode()) <= bare - used
    with pytest.raises(UserError, match=r"without images, more than the limit of 0\.0 MB; report"):
        make_page(results.loaded, [chapter], 20_000)


def test_large_images_are_made_smaller_only_where_they_must(
    tmp_path: Path, chapter: Chapter
) -> None:
    shots = reduced(gather_pictures(chapter), Amount(None, 2, seeds=1)).shots[:6]
    draws = np.random.default_rng(0)
    large = []
    for index, shot in enumerate(shots):
        noise = draws.integers(0, 255, (60, 60, 3), dtype=np.uint8)
        path = tmp_path / f"{index}.png"
        Image.fromarray(noise).resize((600, 600)).save(path)
        large.append(replace(shot, path=path))
    gallery = replace(gather_pictures(chapter), shots=tuple(large))
    roomy = Fitter([gallery])(10**9)
    assert {pixels(uri).shape for uri in roomy.uris.values()} == {(600, 600, 3)}
    assert roomy.notes == ()
    room = sum(map(len, roomy.uris.values())) // 2
    tight = Fitter([gallery])(room)
    (side,) = {max(pixels(uri).shape) for uri in tight.uris.values()}
    assert f"at most {side} pixels a side" in tight.notes[0]
    assert sum(map(len, tight.uris.values())) <= room


def test_configurations_of_two_seeds_differ_in_the_seed_alone(chapter: Chapter) -> None:
    runs = {one["label"]: one for one in configuration_data(chapter)}
    one, two = (runs[f"G²RPO (HPS), seed {seed}"] for seed in (1, 2))
    assert one["note"] is None
    assert one["values"].keys() == two["values"].keys()
    differing = {key for key in one["values"] if one["values"][key] != two["values"][key]}
    assert differing == {"train.seed"}
    other = runs["DanceGRPO (HPS), seed 1"]["values"]
    assert (one["values"]["train.method.name"], other["train.method.name"]) == (
        "g2rpo", "dance_grpo",
    )  # fmt: skip
    assert runs["Base"]["values"]["train"] == "null"


def test_a_run_of_other_files_says_so_or_is_known_by_its_folder(chapter: Chapter) -> None:
    cell = next(cell for cell in chapter.cells if cell.info.seed == 1)
    runs = {"train": "made-up-elsewhere", "evaluation": "x"}
    changed = replace(cell, info=cell.info.model_copy(update={"runs": runs}))
    elsewhere = replace(chapter, cells=(changed,))
    (said,) = configuration_data(elsewhere)
    assert said["note"] == "the experiment has changed since this run"
    run = chapter.layout.runs / "made-up-elsewhere"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"prompts": {"file": f"{ROOT}/prompts.txt"}}))
    (said,) = configuration_data(elsewhere)
    shutil.rmtree(run)
    assert said["note"] == "from the run's folder"
    # Without a path of this machine.
    assert said["values"]["train.prompts.file"] == "prompts.txt"


def test_every_row_leads_to_where_its_numbers_come_from(chapter: Chapter, html: str) -> None:
    grid = provenance_grid([chapter])
    assert len(grid.rows) == len(chapter.cells) == len(set(grid.anchors))
    page = Parsed(html)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = {(a.get("href") or "")[1:] for tag, a in page.tags if tag == "a"}
    assert {link for link in links if link.startswith("run-")} == {
        "run-made-up-base", *(f"run-made-up-{re.sub('[/_]', '-', key)}" for key in ROWS),
    }  # fmt: skip
    assert links - {""} <= set(ids)
    cell = chapter.cells[1]
    assert cell.info.runs["train"] in page.text
    assert (cell.info.provenance.git_commit or "")[:12] in page.text
    assert "with uncommitted changes" in page.text
    assert "ab" * 32 in page.text


def test_the_page_is_the_same_every_time(results: Results, html: str) -> None:
    assert make_page(results.loaded, [results.chapter()]).html == html


WORDS = """# What was found

Some *words* with a [link](../elsewhere.md), `code`, and <b>no HTML</b>.

| row | a | b | c |
|---|---:|---:|---|
| one <img src=x onerror="window.hacked = 9"> | 0.9 (0.8 to 1.0) | 16 % | yes |
| two | 1,200<br><sub>[1,100, 1,300]</sub> | | no |

## Then

- an item
"""


def test_words_beside_the_tables_are_shown_and_their_tables_sorted(
    results: Results, chapter: Chapter, tmp_path: Path
) -> None:
    for name in ("credit", "made-up", "with-cells"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.md").write_text(WORDS)
    (tmp_path / "with-cells" / "cells").mkdir()
    (tmp_path / "credit" / "credit.md").write_text(f"##{WORDS}")
    origin = chapter.cells[0].info.provenance.model_dump(mode="json")
    cells = [{"row": "hps/g2rpo", "seed": 3, "provenance": origin, "rollouts": []}]
    (tmp_path / "credit" / "credit.json").write_text(json.dumps({"cells": cells}))
    Image.new("RGB", (8, 8)).save(tmp_path / "credit" / "credit.png")
    (tmp_path / "credit" / "credit_reading.md").write_text("# Not this\n")
    (tmp_path / "README.md").write_text("Only words.\n")
    found = find_documents(tmp_path, ["made-up"])
    assert [(one.name, one.title) for one in found] == [
        ("reading", "reading"), ("credit", "What was found"),
    ]  # fmt: skip
    html = make_page(results.loaded, [chapter], documents=found).html
    page = Parsed(html)
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["alt"] == "Figure: What was found"
    assert "and <b>no HTML</b>." in page.text
    assert "elsewhere.md" not in html
    (grid,) = [part for part in found[1].parts if isinstance(part, Grid)]
    assert [head.numeric for head in grid.columns] == [False, True, True, False]
    assert [[box.sort for box in row[1:]] for row in grid.rows] == [
        [0.9, 16.0, "yes"], [1200.0, None, "no"],
    ]  # fmt: skip
    assert grid.rows[1][1].interval == "[1,100, 1,300]"
    assert "<h3>Then</h3>" in html
    origins = found[1].origins
    assert origins is not None
    assert [box.text for box in origins.rows[0][:2]] == ["hps/g2rpo", "3"]
    assert ("weights of hps", "cd" * 32) in origins.rows[0][-1].details
    assert found[0].origins is None


def test_the_overview_counts_what_the_tables_mark(chapter: Chapter) -> None:
    (line,) = overview_grid([chapter]).rows
    finished, seeds, above, below = line[2:6]
    assert finished.text == f"{len(chapter.cells)} of {len(chapter.cells) + 4}"
    assert seeds.text == "3"
    marked = [sign for row in signs(view_of(chapter)["scores"]) for sign, _ in row]
    assert above.sort == marked.count("▲") > 0
    assert below.sort == marked.count("▼")
    assert line[0].link == "chapter-made-up"


def test_the_bar_of_costs_adds_up_to_the_measure_of_equal_cost(chapter: Chapter) -> None:
    cost = view_of(chapter)["cost"]
    totals = {row[0].text: row[-3].sort for row in cost.rows}
    longest = max(float(total or 0) for total in totals.values())
    for row in cost.rows:
        share = sum(part for _, part in row[-1].shares)
        assert share == pytest.approx(float(totals[row[0].text] or 0) / longest)


def test_committed_results_have_no_gap_and_show_the_kept_picture(tmp_path: Path) -> None:
    chapter = load_chapter("tuning", load_profile("mini"), Layout(tmp_path, ROOT / "results"))
    assert (len(chapter.gaps), chapter.seeds) == (0, (101,))
    gallery = gather_pictures(chapter)
    assert gallery.shots == ()
    assert gallery.sheet is not None
    assert "the image grid kept with the tables" in gallery.notes[0]
    shutil.copytree(ROOT / "results" / "mini" / "tuning", tmp_path / "mini" / "tuning")
    done = run_report("--profile", "mini", "--results", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "no finished cells in" in done.output
    path = tmp_path / "mini" / "report.html"
    assert f"wrote {path}" in done.output.replace("\n", "")
    (image,) = [attributes for tag, attributes in Parsed(path.read_text()).tags if tag == "img"]
    data = base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,"))
    assert data == gallery.sheet.read_bytes()
    assert image["alt"]


def run_report(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["report", *arguments])


def test_the_command_writes_the_page(results: Results, tmp_path: Path) -> None:
    place = ["--profile", str(results.profile), "--results", str(results.folder)]
    done = run_report(str(results.experiment), *place, "--seeds", "1")
    assert done.exit_code == 0, done.output
    path = results.folder / "runs" / "made-up" / "made-up" / "report.html"
    assert f"wrote {path}" in done.output
    page = Parsed(path.read_text())
    assert "1 run is missing" in page.text
    assert "checkpoint" in page.text
    other = tmp_path / "both.html"
    done = run_report(str(results.experiment), "table1", *place, "--output", str(other))
    assert done.exit_code == 0, done.output
    text = Parsed(other.read_text()).text
    assert "2 experiments on the profile made-up" in text
    assert "Finished\n0 of 11 runs" in text.replace("Finished0", "Finished\n0")
    nothing = run_report("table1", *place[:2], "--results", str(tmp_path))
    assert isinstance(nothing.exception, UserError)
    assert "no finished cells; run `g2rpo reproduce table1 --profile" in str(nothing.exception)
