"""`g2rpo compare`: names, deltas against scipy, settings, cost; from folders and from cells."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from cell_factory import make_cell, make_scores
from run_folders import (
    DAMAGE,
    PROVENANCE,
    damage,
    prompt_means,
    write,
    write_evaluation,
    write_run,
)
from typer.testing import CliRunner

from benchmarks.evaluation.results import load_cell, save_cell
from benchmarks.evaluation.statistics import holm
from g2rpo.errors import UserError
from reproduce.cli import app
from reproduce.experiment import ROOT
from reproduce.report.comparison import (
    curve_deltas,
    members,
    provenance_differences,
    score_sections,
    setting_differences,
)
from reproduce.runs.finished import chosen_names, find_runs, settings_of

NAMES = ("g2rpo-hps-seed1-aa", "g2rpo-hps-seed2-bb", "mix_grpo-hps-seed1-cc", "base-dd")
MIX: dict[str, Any] = {"method": {"name": "mix_grpo", "window_size": 4}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of two methods, and a base."""
    folder = tmp_path_factory.mktemp("compare")
    for seed in (1, 2, 3):
        better, worse = {"hps": 0.72, "clip": 0.5}, {"hps": 0.70, "clip": 0.5}
        write_run(folder / "runs", f"g2rpo-hps-seed{seed}-aa", seed=seed, means=better)
        write_run(folder / "runs", f"mix_grpo-hps-seed{seed}-bb", seed=seed, means=worse, **MIX)
    write_evaluation(folder / "runs" / "base-cc", {"hps": 0.69, "clip": 0.5})
    return folder


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("g2rpo-hps", "several runs: g2rpo-hps-seed1-aa, g2rpo-hps-seed2-bb; use a longer prefix"),
        ("g2rpo-hps-sead1", "did you mean 'g2rpo-hps-seed1-aa'?"),
        ("mixgrpo", "did you mean 'mix_grpo-hps-seed1-cc'?"),
        ("zzzz", "list them with `g2rpo runs`"),
        ("", "no run ''"),
    ],
)
def test_an_unknown_or_ambiguous_name_is_one_line_with_the_nearest(part: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        chosen_names(part, NAMES)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_beginnings_whole_names_and_patterns_are_found() -> None:
    assert chosen_names("mix", NAMES) == ["mix_grpo-hps-seed1-cc"]
    assert chosen_names("g2rpo-hps-seed*", NAMES) == list(NAMES[:2])
    assert chosen_names("base", ("base", "base-2")) == ["base"]
    with pytest.raises(UserError, match="no runs yet"):
        chosen_names("a", ())


def test_a_run_is_named_by_its_folder_too_and_a_path_is_not_taken_for_a_name(made: Path) -> None:
    folder = made / "runs" / "g2rpo-hps-seed1-aa"
    for given, where in ((folder, Path("elsewhere")), (str(folder)[:-2], made)):
        (found,) = find_runs([str(given)], where)
        assert found.name == folder.name and found.seed == 1
    for parts, message in (
        ([str(folder), "g2rpo-hps-seed1"], "given twice"),
        ([str(made / "elsewhere" / folder.name)], "no such run"),
        ([str(made / "runs")], "not a run folder"),
    ):
        with pytest.raises(UserError, match=message):
            find_runs(parts, made)


def test_three_shared_seeds_are_compared_as_methods(made: Path) -> None:
    compared = members(find_runs(["mix_grpo-*", "g2rpo-*", "base"], made))
    assert [member.letter for member in compared] == ["A", "B", "C"]
    (section,) = score_sections(compared)
    assert (section.prompts, section.missing) == (20, ())
    found = {(delta.quantity, delta.member): delta for delta in section.deltas}
    seeds = (1, 2, 3)
    for reward in ("hps", "clip"):
        ours = [prompt_means({"hps": 0.72, "clip": 0.5}, s)[reward].mean() for s in seeds]
        theirs = [prompt_means({"hps": 0.70, "clip": 0.5}, s)[reward].mean() for s in seeds]
        expected = scipy.stats.ttest_rel(ours, theirs)
        interval = expected.confidence_interval(0.95)
        comparison = found[reward, "B"].comparison
        assert comparison is not None and comparison.about == "method"
        got = [comparison.difference, comparison.low, comparison.high]
        wanted = [np.mean(ours) - np.mean(theirs), interval.low, interval.high]
        assert got == pytest.approx(wanted, abs=1e-7)
        assert found[reward, "B"].value == pytest.approx(np.mean(ours))
        assert found[reward, "A"].comparison is None
    tested = [delta for delta in section.deltas if delta.comparison is not None]
    adjusted = holm([delta.comparison.p_value for delta in tested if delta.comparison])
    assert [delta.adjusted for delta in tested] == pytest.approx(list(adjusted))
    assert len(tested) == 2 * 3  # two members in two rewards and a measure of diversity
    assert {delta.seeds for delta in tested} == {seeds}  # the base has none of its own


@pytest.mark.parametrize("reference", ["mix_grpo-hps-seed2", "mix_grpo-*"])
def test_one_shared_seed_is_compared_over_prompts(made: Path, reference: str) -> None:
    compared = members(find_runs([reference, "g2rpo-hps-seed2"], made))
    (section,) = score_sections(compared)
    (delta,) = (d for d in section.deltas if d.quantity == "hps" and d.member == "B")
    assert delta.comparison is not None and delta.adjusted is not None
    assert (delta.comparison.about, delta.comparison.count) == ("checkpoint", 20)
    ours, theirs = (prompt_means({"hps": mean, "clip": 0.5}, 2)["hps"] for mean in (0.72, 0.70))
    assert delta.comparison.difference == pytest.approx(np.mean(ours - theirs), abs=1e-6)
    assert delta.adjusted < 0.05 and delta.seeds == (2,)
    (point,) = curve_deltas(compared)
    assert (point.seeds, point.difference) == ((2,), pytest.approx(0.0))


def test_scores_under_two_protocols_never_meet(results: Path) -> None:
    names = ["base-cc", "g2rpo-hps-seed1-aa"]
    assert len(score_sections(members(find_runs(names, results)))) == 1
    (path,) = (results / "runs" / "base-cc").glob("evaluations/*/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["inputs"]["protocol"]["images"] = 4
    path.write_text(json.dumps(manifest))
    scores = path.with_name("scores.parquet")
    frame = pd.read_parquet(scores)
    pd.concat([frame, frame]).to_parquet(scores, index=False)
    assert score_sections(members(find_runs(names, results))) == []


def test_settings_that_differ_are_listed_and_the_others_are_not(results: Path) -> None:
    write_run(results / "runs", "other-1", **MIX, execution={"compile": True})
    compared = members(find_runs(["g2rpo-*", "other", "base"], results))
    found = {one.key: one for one in setting_differences(compared)}
    assert found.keys() == {"method.name", "method.window_size", "seed", "execution.compile"}
    assert found["seed"].values == ("1, 2, 3", "1", "–")
    assert found["method.window_size"].values == ("–", "4", "–")
    assert not found["execution.compile"].determining and found["seed"].determining


def test_what_runs_were_made_with_is_compared(results: Path) -> None:
    folder = write_run(results / "runs", "other-1", **MIX)
    manifest = {
        "progress": {"iteration": 4},
        "provenance": PROVENANCE | {"git_commit": "d" * 40, "packages": {"torch": "2.15"}},
    }
    write(folder / "manifest.json", manifest)
    compared = members(find_runs(["g2rpo-hps-seed1", "other"], results))
    found = {one.key: one.values for one in provenance_differences(compared)}
    assert found == {
        "git_commit": ("c" * 40, "d" * 40),
        "packages.torch": ("2.14.1", "2.15"),
    }


def test_unfinished_runs_are_compared_by_their_curves(results: Path) -> None:
    write_run(results / "runs", "short-1", iterations=2, finished=False, **MIX)
    compared = members(find_runs(["g2rpo-hps-seed2", "short"], results))
    assert score_sections(compared) == []
    (point,) = curve_deltas(compared)
    assert (point.member, point.quantity, point.iteration) == ("B", "hps", 2)
    assert point.difference == pytest.approx(-0.001) and point.comparison is None
    (methods,) = curve_deltas(members(find_runs(["g2rpo-*", "mix*"], results)))
    assert methods.iteration == 4 and methods.comparison is not None


def test_validation_rewards_are_corrected_over_their_table(tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "table1").symlink_to(ROOT / "results" / "mini" / "table1")
    names = [f"{row}-hps-seed?-*" for row in ("flow_grpo", "mix_grpo", "dance_grpo")]
    compared = members(find_runs(names, tmp_path))
    points = curve_deltas(compared)
    tested = [one.comparison.p_value for one in points if one.comparison]
    assert len(tested) == len(points) == 2
    assert [one.adjusted for one in points] == pytest.approx(holm(tested).tolist())


def test_runs_of_one_method_alone_and_twins_are_refused(results: Path) -> None:
    with pytest.raises(UserError, match="differ only in their seed"):
        members(find_runs(["g2rpo-*"], results))
    with pytest.raises(UserError, match="only one run is named"):
        members(find_runs(["g2rpo-hps-seed2"], results))
    write_run(results / "runs", "twin-1")
    with pytest.raises(UserError, match="same settings and seed"):
        members(find_runs(["g2rpo-hps-seed1", "twin", "mix*"], results))


EVALUATION = "evaluations/test-0123456789ab"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *DAMAGE,
        ("metrics.jsonl", b'{"iteration": 1, "validation/hps": "0.5"}\n'),
        ("manifest.json", b'{"provenance": {}}'),
        ("manifest.json", json.dumps({"provenance": PROVENANCE}).encode()),
        ("manifest.json", json.dumps({"provenance": PROVENANCE, "progress": [4]}).encode()),
        (f"{EVALUATION}/manifest.json", json.dumps({"provenance": PROVENANCE}).encode()),
        (f"{EVALUATION}/scores.parquet", b"PAR1"),
        (f"{EVALUATION}/diversity.parquet", b""),
    ],
)
def test_a_damaged_run_is_one_line(results: Path, file: str, content: bytes) -> None:
    folder = results / "runs" / "g2rpo-hps-seed1-aa"
    damage(folder, file, content)
    with pytest.raises(UserError) as error:
        find_runs(["g2rpo-hps-seed1"], results)
    assert str(error.value).startswith(str(folder / file)) and "\n" not in str(error.value)
    members(find_runs(["g2rpo-hps-seed2", "mix_grpo-hps-seed1"], results))


def test_a_last_row_without_its_cost_is_one_line(results: Path) -> None:
    folder = write_run(results / "runs", "other-1", finished=False)
    damage(folder, "metrics.jsonl", b'{"iteration": 1, "device_seconds": null}\n')
    with pytest.raises(UserError, match=r"other-1/metrics\.jsonl: cannot"):
        find_runs(["other"], results)


def test_the_command_prints_scores_settings_and_cost(made: Path) -> None:
    arguments = ["compare", "mix*", "g2rpo*", "base", "--results", str(made)]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert lines[1][:3] == ["A", "(reference):", "mix_grpo-hps-seed1-bb,"]
    assert ["learning_rate"] not in lines
    assert ["Rollout", "evaluations", "400", "400", "(1.00×)", "0", "(0.00×)"] in lines
    assert any(line[:2] == ["method.name", "mix_grpo"] for line in lines)


@pytest.mark.parametrize("width", [20, 0])
@pytest.mark.parametrize(
    "arguments", [["compare", "mix*", "g2rpo*", "base"], ["runs"]], ids=lambda a: a[0]
)
def test_a_narrow_terminal_cuts_no_number(made: Path, arguments: list[str], width: int) -> None:
    wide = CliRunner().invoke(app, [*arguments, "--results", str(made)])
    terminal = {"COLUMNS": str(width), "TTY_COMPATIBLE": "1", "TERM": "xterm"}
    environment = terminal if width else {"COLUMNS": "20"}  # piped
    shown = CliRunner().invoke(app, [*arguments, "--results", str(made)], env=environment)
    assert shown.exit_code == 0, shown.output
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout)
    figure = re.compile(r"(?<![\w.-])[+-]?\d+\.\d+(?![\w.])")
    assert Counter(figure.findall(text)) == Counter(figure.findall(wide.stdout))
    assert len(figure.findall(wide.stdout)) > 10
    if width:
        assert max(map(len, text.splitlines())) <= width
    else:
        assert len(text.splitlines()) == len(wide.stdout.splitlines())


def test_a_cell_is_a_run_too() -> None:
    cells = ROOT / "results" / "mini" / "table1" / "cells"
    chosen = sorted(cells.glob("hps--*_grpo__seed1.json"))
    records = find_runs([str(path) for path in chosen], Path("elsewhere"))
    assert [record.seed for record in records] == [1] * len(chosen)
    assert len(score_sections(members(records))) == 1
    with pytest.raises(UserError, match=r"absent\.json: no such run"):
        find_runs([str(cells / "absent.json")], ROOT / "results")


def test_the_settings_of_a_cell_that_lies_near_the_root_are_not_known() -> None:
    (chosen,) = (ROOT / "results" / "mini" / "table1" / "cells").glob("hps--g2rpo__seed1.json")
    cell = load_cell(chosen)
    assert settings_of(cell, chosen) is not None
    for place in ("/cell.json", "/tmp/cell.json", "/table1/cells/cell.json", "/a/b/c/cell.json"):
        assert settings_of(cell, Path(place)) is None


def unknown_cell(folder: Path, row: str, seed: int, commit: str | None = None) -> str:
    """A cell of no experiment that is known here."""
    made = make_cell(row, seed=seed, scores=make_scores({"hps": 0.5}, seed=seed))
    provenance = made.info.provenance.model_copy(update={"git_commit": commit})
    runs = {"train": f"g2rpo-hps-seed{seed}-{folder.name}-{commit}"}
    info = made.info.model_copy(update={"provenance": provenance, "runs": runs})
    return str(save_cell(replace(made, info=info), folder))


def test_cells_without_settings_are_taken_together_in_one_folder_of_one_commit(
    tmp_path: Path,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    cells = [
        unknown_cell(one, "g2rpo", 1), unknown_cell(two, "g2rpo", 2), unknown_cell(one, "g2rpo", 3),
        unknown_cell(one, "g2rpo", 4, "e" * 40), unknown_cell(two, "g2rpo", 1),
    ]  # fmt: skip
    compared = members(find_runs(cells, tmp_path))
    assert [member.seeds for member in compared] == [(1, 3), (1, 2), (4,)]
    shown = CliRunner().invoke(app, ["compare", *cells])
    assert shown.exit_code == 0, shown.output
    assert "Settings of A, B, C: unknown" in shown.stdout
    assert "The runs of A, B are grouped as cells of one row" in shown.stdout
    alone = CliRunner().invoke(app, ["compare", cells[0], cells[1]])
    assert alone.exit_code == 0 and "grouped" not in alone.stdout


def test_committed_results_are_compared_by_the_names_of_their_runs(tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "table1").symlink_to(ROOT / "results" / "mini" / "table1")
    records = find_runs(["mix_grpo-hps-seed[123]-*", "g2rpo-hps-seed1-*"], tmp_path)
    assert all(record.settings is not None for record in records)
    compared = members(records)
    folder = ROOT / "results" / "mini" / "table1" / "cells"
    committed = len([*folder.glob("hps--mix_grpo__seed[123].json")])
    assert compared[0].seeds == tuple(range(1, committed + 1))
    assert {section.prompts for section in score_sections(compared)} == {400}
    assert all(run.cost is not None and run.cost.iterations for run in records)
