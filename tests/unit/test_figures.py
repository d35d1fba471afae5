"""Learning curves and picture grids: what is drawn, read back."""

import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from cell_factory import make_cell, make_scores
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.evaluation.results import Cell
from g2rpo.errors import UserError
from reproduce.experiment import load_experiment, load_profile
from reproduce.experiment.layout import Layout
from reproduce.experiment.table import TableSpec
from reproduce.tables import figures
from reproduce.tables.equal_cost import equal_cost_markdown
from reproduce.tables.figures import Band, Metric, learning_curves, seed_band
from reproduce.tables.frontier import frontier_figure, pareto_points
from reproduce.tables.picture_grid import picture_grid
from reproduce.tables.publish import publish
from reproduce.tables.table import compute_table

METRIC = Metric("reward/hps/mean", "HPS")


def run(seed: int, iterations: int = 12, cost: int = 100) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    steps = np.arange(1, iterations + 1)
    return pd.DataFrame(
        {
            "iteration": steps,
            "rollout_evaluations": steps * cost,
            "seconds": steps * (1.0 + seed),
            "reward/hps/mean": 0.3 + 0.01 * steps + rng.normal(0, 0.01, iterations),
        }
    )


def test_band_is_the_t_interval_at_the_shared_iterations() -> None:
    runs = [run(0), run(1), run(2, iterations=9)]
    band = seed_band(runs, METRIC, "seconds")
    assert band is not None
    assert band.low is not None
    assert band.high is not None
    assert band.x == pytest.approx([step * 2.0 for step in range(1, 10)])
    for index in range(9):
        values = [frame["reward/hps/mean"][index] for frame in runs]
        expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (band.low[index], band.high[index]) == pytest.approx((expected.low, expected.high))
        assert band.mean[index] == pytest.approx(np.mean(values))


def test_no_band_below_three_seeds_and_no_curve_without_the_metric() -> None:
    band = seed_band([run(0), run(1)], METRIC, "iteration")
    assert band is not None
    assert band.low is None
    assert seed_band([run(0)], Metric("absent", "absent"), "iteration") is None


def test_smoothing_is_a_centred_running_mean() -> None:
    frame = run(0, iterations=40)
    band = seed_band([frame], Metric("reward/hps/mean", "HPS", smooth=True), "iteration")
    assert band is not None
    values = frame["reward/hps/mean"].to_numpy()
    # An eighth of 40 is 5: two points on either side.
    middle = {int(x): y for x, y in zip(band.x, band.mean, strict=True)}
    assert middle[20] == pytest.approx(values[17:22].mean())


def test_learning_curves_are_drawn(tmp_path: Path) -> None:
    curves = {
        "DanceGRPO": [run(seed) for seed in range(3)],
        "G²RPO": [run(seed + 5, cost=900) for seed in range(2)],
    }
    path = tmp_path / "curves.png"
    metrics = [METRIC, Metric("reward/hps/mean", "HPS again", smooth=True)]
    assert learning_curves(curves, metrics, path, title="Test") == path
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    # The first two colours of the palette are there: both methods were drawn.
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (np.abs(pixels.astype(int) - colour).sum(axis=2) < 12).sum() > 50
    pdf = path.with_suffix(".pdf")
    first = path.read_bytes(), pdf.read_bytes()
    assert first[1].startswith(b"%PDF-") and b"CreationDate" not in first[1]
    learning_curves(curves, metrics, path, title="Test")
    assert (path.read_bytes(), pdf.read_bytes()) == first


def test_a_legend_of_long_labels_stays_inside_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, _: drawn.append(figure))
    labels = [f"four rewards, combination {n}: sum of their advantages" for n in range(7)]
    learning_curves({label: [run(0)] for label in labels}, [METRIC], tmp_path / "curves.png")
    (figure,) = drawn
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert len(figure.legends) == 1 and len(figure.legends[0].get_texts()) == len(labels)
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6),
        min_size=1,
        max_size=4,
    )
)
def test_the_pareto_set_is_what_no_cheaper_point_reaches(
    lines: list[list[tuple[int, int]]],
) -> None:
    curves = [Band(*np.array(line, dtype=float).T, None, None) for line in lines]
    every = [point for line in lines for point in line]
    for line, places in zip(lines, pareto_points(curves), strict=True):
        for index, (cost, reward) in enumerate(line):
            best = max((y for x, y in every if x <= cost), default=0)
            cheapest = min((x for x, y in every if y >= reward), default=0)
            assert (index in places) == (cost > 0 and reward == best and cost == cheapest)


def frontier_cell(row: str, seed: int, cost: int) -> Cell:
    curve = run(seed, cost=cost).rename(columns={"reward/hps/mean": "validation/hps"})
    curve["training_forwards"] = curve["training_backwards"] = 10 * curve["iteration"]
    curve["device_seconds"] = 2.0 * curve["iteration"]
    start = {"iteration": [0], "rollout_evaluations": [0], "validation/hps": [0.3]}
    whole = pd.concat([pd.DataFrame(start), curve], ignore_index=True)
    return replace(made_cell(row, seed), curve=whole)


def made_cell(row: str, seed: int) -> Cell:
    return make_cell(row, seed=seed, train=("hps",), scores=make_scores({"hps": 0.3}, seed=seed))


def test_the_frontier_is_drawn_against_both_costs(tmp_path: Path) -> None:
    rows = [{"key": k, "label": k.upper(), "train": ["hps"]} for k in ("dear", "cheap", "gone")]
    spec = TableSpec(
        name="small", title="Test", rows=rows, columns=[{"reward": "hps", "label": "HPS"}]
    )
    cells = [frontier_cell("dear", s, 900) for s in (1, 2, 3)]
    cells += [frontier_cell("cheap", s, 100) for s in (1, 2, 3)]
    table = compute_table(spec, cells, "mini")
    path = tmp_path / "frontier.png"
    assert frontier_figure(table, cells, path) == path
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for number in (0, 2):  # the colours of the first two rows, in both halves of the picture
        colour = [round(255 * part) for part in matplotlib.colormaps["tab20"](number)[:3]]
        found = np.abs(pixels - colour).sum(axis=2) < 12
        middle = found.shape[1] // 2
        assert min(found[:, :middle].sum(), found[:, middle:].sum()) > 50
    pdf = path.with_suffix(".pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    frontier_figure(table, cells, path)
    assert path.with_suffix(".pdf").read_bytes() == pdf
    assert frontier_figure(table, [made_cell("dear", 1)], path) is None
    old = cells[0]
    assert old.curve is not None
    without_seconds = replace(old, curve=old.curve.drop(columns="device_seconds"))
    assert frontier_figure(table, [without_seconds], path) is None


def test_rows_are_compared_at_the_cost_that_every_run_has_reached() -> None:
    rows = [{"key": k, "label": k.upper(), "train": ["hps"]} for k in ("dear", "cheap", "one")]
    columns = [{"reward": "hps", "label": "HPS", "digits": 4}]
    spec = TableSpec(name="small", title="Test", rows=rows, columns=columns)
    cells = [frontier_cell("dear", s, 900) for s in (1, 2, 3, 4)]
    cells += [frontier_cell("cheap", s, 100) for s in (1, 2, 3)] + [frontier_cell("one", 1, 300)]
    text = equal_cost_markdown(compute_table(spec, cells, "mini"), cells, ["dear"])
    at_nfe, at_seconds = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()]
        for part in re.split(r"\*\*HPS at .*\*\*\n\n", text)[1:]
    )
    assert "at 1,560 rollout evaluations + 3 × backwards" in text  # 12 iterations of `cheap`
    assert "at 24 device-seconds" in text

    def reached(row: str, seed: int, iterations: float) -> float:
        curve = next(c for c in cells if (c.info.row, c.info.seed) == (row, seed)).curve
        assert curve is not None
        values = curve["validation/hps"].tolist()
        low = int(iterations)
        return values[low] + (iterations - low) * (values[min(low + 1, 12)] - values[low])

    for lines, iterations in (
        (at_nfe, {"dear": 1560 / 930, "cheap": 12, "one": 1560 / 330}),
        (at_seconds, {"dear": 12, "cheap": 12, "one": 12}),
    ):
        assert lines[0] == ["Row", "Seeds", "Mean", "95% interval", "Versus DEAR", "p (Holm)"]
        found = {line[0]: line[1:] for line in lines[2:5]}
        assert list(found) == sorted(found, key=lambda label: -float(found[label][1]))
        dear, cheap, one = (
            np.array([reached(row, seed, iterations[row]) for seed in seeds])
            for row, seeds in (("dear", (1, 2, 3, 4)), ("cheap", (1, 2, 3)), ("one", (1,)))
        )
        low, high = scipy.stats.t.interval(0.95, 3, dear.mean(), scipy.stats.sem(dear))
        assert found["DEAR"] == ["4", f"{dear.mean():.4f}", rf"\[{low:.4f}, {high:.4f}\]", "–", "–"]
        assert found["ONE"] == ["1", f"{one[0]:.4f}", "–", "–", "–"]
        test = scipy.stats.ttest_rel(cheap, dear[:3])
        gap = (cheap - dear[:3]).mean()
        if iterations["dear"] == iterations["cheap"]:  # the same values at the same seeds
            assert found["CHEAP"][3:] == [r"0.0000 \[0.0000, 0.0000\]", "1.000"]
        else:
            assert found["CHEAP"][3].startswith(f"{gap:+.4f} ")
            assert found["CHEAP"][4] == (
                f"{test.pvalue:.3f}" if test.pvalue > 0.001 else r"\< 0.001"
            )


@pytest.mark.parametrize("absent", ["column", "values"])
def test_a_row_without_validation_is_left_out_at_equal_cost(absent: str, tmp_path: Path) -> None:
    rows = [{"key": key, "label": key.upper(), "train": ["hps"]} for key in ("one", "two")]
    columns = [{"reward": "hps", "label": "HPS"}]
    spec = TableSpec(name="small", title="Test", rows=rows, columns=columns)
    cells = [frontier_cell(key, 1, 300) for key in ("one", "two")]
    curve, key = cells[1].curve, "validation/hps"
    assert curve is not None
    curve = curve.drop(columns=key) if absent == "column" else curve.assign(**{key: np.nan})
    cells[1] = replace(cells[1], curve=curve)
    table = compute_table(spec, cells, "mini")
    text = equal_cost_markdown(table, cells, [])
    assert "| ONE |" in text and "TWO" not in text
    assert frontier_figure(table, cells, tmp_path / "frontier.png") is not None


def test_a_table_is_published_without_validation_rewards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, profile = load_experiment("table1"), load_profile("flux")
    layout = Layout(tmp_path / "runs", tmp_path / "tables")
    curve = frontier_cell("dear", 1, 900).curve
    assert curve is not None and profile.validation_prompts == 0
    curve = curve.drop(columns="validation/hps")
    cell = make_cell("hps/g2rpo", seed=1, train=("hps",), scores=make_scores({"hps": 0.3}))
    runs = {"train": "run", "evaluation": "test"}
    cell = replace(cell, info=cell.info.model_copy(update={"runs": runs}), curve=curve)
    publish(experiment, profile, [cell], [], layout)
    shown = capsys.readouterr().out
    assert "no learning curves: no run has validation rewards" in shown
    assert "G²RPO" in shown and "wrote" in shown
    written = {path.name for path in layout.experiment("flux", "table1").iterdir()}
    assert "table1.md" in written and "frontier.png" not in written


def test_groups_are_compared_apart(tmp_path: Path) -> None:
    groups = {"one": ["dear", "cheap"], "two": ["other"]}
    rows = [
        {"key": key, "label": key.upper(), "train": ["hps"], "group": group}
        for group, keys in groups.items()
        for key in keys
    ]
    spec = TableSpec(
        name="small", title="Test", rows=rows, columns=[{"reward": "hps", "label": "HPS"}]
    )
    made = (("dear", 900), ("cheap", 100), ("other", 500))
    cells = [frontier_cell(key, seed, cost) for key, cost in made for seed in (1, 2, 3)]
    table = compute_table(spec, cells, "mini")
    text = equal_cost_markdown(table, cells, ["dear", "other"])
    parts = re.split(r"\*\*(HPS .*)\*\*\n\n", text)
    found = {
        title: [line.split("|")[1].strip() for line in part.strip().splitlines()[2:]]
        for title, part in zip(parts[1::2], parts[2::2], strict=True)
    }
    for title, labels in found.items():
        group = "one" if "trained on one" in title else "two"
        assert sorted(labels) == sorted(key.upper() for key in groups[group])
    assert len(found) == 4
    path = tmp_path / "frontier.png"
    frontier_figure(table, cells, path)
    with Image.open(path) as picture:
        assert picture.height > 0.7 * picture.width  # a row of panels for each group


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no learning curve"):
        learning_curves({"G²RPO": []}, [METRIC], tmp_path / "curves.png")


def test_small_images_are_enlarged_pixel_by_pixel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {
        label: [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2)]
        for label in ("Base", "G²RPO without granularities")
    }
    prompts = ["a red circle", "a caption so long that it has to be wrapped over many lines " * 3]
    path = picture_grid(images, prompts, tmp_path / "grid.png")
    with Image.open(path) as picture:
        canvas = np.asarray(picture)
    height, width = canvas.shape[:2]
    box = b"/MediaBox [ 0 0 %g %g ]" % (width * 72 / 150, height * 72 / 150)
    assert box in path.with_suffix(".pdf").read_bytes()
    for column in images.values():
        for image in column:
            assert contains(canvas, np.kron(image, np.ones((4, 4, 1), dtype=np.uint8)))


def contains(canvas: np.ndarray, block: np.ndarray) -> bool:
    height, width = block.shape[:2]
    corners = np.argwhere((canvas == block[0, 0]).all(axis=2))
    return any(
        np.array_equal(canvas[top : top + height, left : left + width], block)
        for top, left in corners
    )


def test_large_images_are_reduced(tmp_path: Path) -> None:
    large = np.full((360, 720, 3), (200, 30, 30), dtype=np.uint8)
    path = picture_grid({"Base": [large]}, ["a caption"], tmp_path / "grid.png")
    with Image.open(path) as picture:
        canvas = np.asarray(picture)
    red = np.argwhere((canvas == (200, 30, 30)).all(axis=2))
    assert (red.max(axis=0) - red.min(axis=0) + 1).tolist() == [64, 128]
