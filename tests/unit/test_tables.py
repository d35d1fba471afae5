"""Tables, read back from every format and compared with what plain loops compute."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml
from cell_factory import (
    COLUMNS,
    TABLE1,
    TABLE2,
    TABLE3,
    csv_rows,
    make_cell,
    make_scores,
    make_table_cells,
    render,
)
from golden import table_of
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.evaluation.results import Protocol
from benchmarks.evaluation.statistics import human
from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.text import visible
from reproduce.experiment.table import TableSpec
from reproduce.tables.latex import latex_escape, to_latex
from reproduce.tables.markdown import markdown_escape
from reproduce.tables.model import grouped
from reproduce.tables.notes import Gap
from reproduce.tables.paper import PAPER_TABLES, PaperKey, load_paper_tables
from reproduce.tables.table import compute_table
from reproduce.tables.terminal import print_table

SPECS = {data["name"]: validate(TableSpec, data, data["name"]) for data in (TABLE1, TABLE2, TABLE3)}
SPEC = SPECS["table1"]
MISSING = "hps/mix_grpo"
GAPS = (Gap(MISSING, "stopped at 40%"), Gap("hps/g2rpo", "out of memory", seed=3))
CELLS = make_table_cells(SPEC, leave_out=(MISSING,))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Table 1 with gaps, in every format."""
    return render(SPEC, CELLS, tmp_path_factory.mktemp("table1"), gaps=GAPS)


def markdown_rows(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text: header first, the rule left out, escapes undone."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            tables.append([])
            inside = True
        if not line.startswith("|---"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            tables[-1].append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
    return tables


def plain_score(row: str, reward: str) -> tuple[float, float, float] | None:
    """Mean and t interval over seeds, by loops over the cells."""
    means = []
    for cell in CELLS:
        if cell.info.row == row:
            scores = [
                float(score)
                for _, name, score in cell.scores.itertuples(index=False)
                if name == reward
            ]
            means.append(sum(scores) / len(scores))
    if not means:
        return None
    if len(means) == 1:
        return means[0], np.nan, np.nan
    interval = scipy.stats.ttest_1samp(means, 0).confidence_interval(0.95)
    return sum(means) / len(means), interval.low, interval.high


def test_markdown_matches_plain_loops(texts: dict[str, str]) -> None:
    ours, _ = markdown_rows(texts["markdown"])
    header, *lines = ours
    assert header[:5] == ["Trained on", "Method", "HPS", "CLIP", "Attributes"]
    assert len(lines) == len(SPEC.rows)
    for spec, line in zip(SPEC.rows, lines, strict=True):
        assert line[:2] == [spec.group, spec.label]
        for column, shown in zip(SPEC.columns, line[2:5], strict=True):
            expected = plain_score(spec.key, column.reward)
            if expected is None:
                assert not re.search(r"\d", shown.replace("40%", ""))
                continue
            figures = [float(n) for n in re.findall(r"\d+\.\d{3}", shown)]
            assert figures[0] == pytest.approx(expected[0], abs=5.1e-4)
            assert ("†" in shown) == (column.reward in spec.train)
            if spec.key != "base":
                assert figures[1:] == pytest.approx(expected[1:], abs=5.1e-4)


def test_csv_has_all_digits_costs_and_marks(texts: dict[str, str]) -> None:
    rows = csv_rows(texts["csv"])
    for spec, row in zip(SPEC.rows, rows, strict=True):
        assert (row["row"], row["group"], row["source"]) == (spec.key, spec.group, "measured")
        for column in SPEC.columns:
            expected = plain_score(spec.key, column.reward)
            assert row[f"{column.reward}_in_domain"] == str(int(column.reward in spec.train))
            if expected is None:
                assert row[column.reward] == ""
            else:
                assert float(row[column.reward]) == pytest.approx(expected[0], rel=1e-6)
    for group in ("HPS", "HPS & CLIP"):
        members = [row for row in rows if row["group"] == group and row["hps"]]
        printed = [f"{float(row['hps']):.3f}" for row in members]
        expected_best = [str(int(figure == max(printed))) for figure in printed]
        assert [row["hps_best"] for row in members] == expected_best
    by_key = {row["row"]: row for row in rows}
    assert by_key[MISSING]["missing"] == "stopped at 40%" and by_key[MISSING]["protocol"] == ""
    assert by_key["hps/g2rpo"]["protocol"] == "test-captions (0123456789ab)"
    # Seeds 0, 1, 2 cost 120,000, 121,000 and 122,000 evaluations and 100.5, 101.5, 102.5 seconds.
    assert float(by_key["hps/g2rpo"]["rollout_evaluations"]) == 121_000
    assert float(by_key["hps/g2rpo"]["device_seconds"]) == 101.5
    assert by_key["base"]["rollout_evaluations"] == "0"
    assert {row["source"] for row in rows} == {"measured"}


def test_best_is_bold_within_its_group_and_ties_share_it(tmp_path: Path) -> None:
    scores = make_scores({"hps": 0.3, "clip": 0.3, "attributes": 0.3})
    cells = [
        make_cell(row.key, seed=0, scores=scores, train=row.train)
        for row in SPEC.rows
        if row.key in ("hps/dance_grpo", "hps/g2rpo", "hps-clip/g2rpo")
    ]
    texts = render(SPEC, cells, tmp_path)
    best = {row["row"]: row["hps_best"] for row in csv_rows(texts["csv"])}
    assert best["hps/dance_grpo"] == best["hps/g2rpo"] == "1"
    # Alone in its group it is not the best of anything.
    assert best["hps-clip/g2rpo"] == "0"
    ours, _ = markdown_rows(texts["markdown"])
    assert {line[1] for line in ours if "**" in line[2]} == {"DanceGRPO", "G²RPO"}


@pytest.mark.parametrize(("seeds", "label"), [(2, "checkpoint"), (3, "method")])
def test_intervals_are_labelled_by_the_number_of_seeds(
    tmp_path: Path, seeds: int, label: str
) -> None:
    texts = render(SPEC, make_table_cells(SPEC, seeds=seeds), tmp_path)
    rows = {row["row"]: row for row in csv_rows(texts["csv"])}
    assert (rows["hps/g2rpo"]["interval"], rows["hps/g2rpo"]["seeds"]) == (label, str(seeds))
    assert (rows["base"]["interval"], rows["base"]["seeds"]) == ("checkpoint", "0")
    assert ("Method intervals" in texts["markdown"]) == (label == "method")
    assert "Checkpoint intervals" in texts["markdown"]


def test_gaps_have_a_reason_and_no_number(texts: dict[str, str]) -> None:
    ours, _ = markdown_rows(texts["markdown"])
    (line,) = [line for line in ours if line[:2] == ["HPS", "MixGRPO"]]
    assert line[2] == "*missing: stopped at 40%*"
    assert set(line[3:]) == {"–"}
    assert r"\textit{missing: stopped at 40\%}" in texts["latex"]
    assert "G²RPO (HPS): seed 3 is missing (out of memory)." in texts["markdown"]


def test_a_group_of_which_nothing_was_run_is_one_note() -> None:
    cells = [cell for cell in CELLS if not cell.info.row.startswith("hps-clip/")]
    table = compute_table(SPEC, cells, "mini", GAPS)
    assert {row.group for row in table.rows} == {"nothing", "HPS"}
    assert "Not run: Trained on HPS & CLIP: 5 rows." in table.notes
    failed = compute_table(SPEC, cells, "mini", (*GAPS, Gap("hps-clip/g2rpo", "out of memory")))
    assert {row.key: row.missing for row in failed.rows}["hps-clip/g2rpo"] == "out of memory"


def test_a_gap_without_a_reason_was_not_run(tmp_path: Path) -> None:
    ours, _ = markdown_rows(render(SPEC, [], tmp_path)["markdown"])
    assert {line[2] for line in ours[1:]} == {"*missing: not run*"}
    assert not any("**" in cell for line in ours for cell in line)


def test_a_row_that_was_not_scored_by_a_column_has_a_gap_there(tmp_path: Path) -> None:
    cell = make_cell("base", seed=None, scores=make_scores({"hps": 0.3, "attributes": 0.5}))
    texts = render(SPEC, [cell], tmp_path)
    base = csv_rows(texts["csv"])[0]
    assert (base["clip"], base["clip_low"]) == ("", "")
    assert float(base["hps"]) > 0
    assert "Base (nothing): not scored by CLIP." in texts["markdown"]


def facts(table: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = yaml.safe_load(PAPER_TABLES.read_text())[table]
    return rows


@pytest.mark.parametrize("table", ["table1", "table2", "table3"])
def test_the_paper_block_holds_exactly_the_papers_figures(tmp_path: Path, table: str) -> None:
    texts = render(SPECS[table], make_table_cells(SPECS[table]), tmp_path)
    ours, (header, *lines) = markdown_rows(texts["markdown"])
    assert len(ours) == len(SPECS[table].rows) + 1
    assert header[-5:] == ["HPS", "CLIP", "PS", "IR", "UR"]
    assert len(lines) == len(facts(table))
    for line, fact in zip(lines, facts(table), strict=True):
        shown = [cell.strip("*†").replace("*", "") for cell in line[-5:]]
        assert shown == [f"{fact[name]:.3f}" for name in header[-5:]]
        assert ["†" in cell for cell in line[-5:]] == [
            name in fact["train"] for name in header[-5:]
        ]
    caption = "The paper's figures, for FLUX.1-dev: another model, not comparable"
    assert caption in texts["markdown"]
    assert caption in texts["latex"]
    published = csv_rows(texts["paper_csv"])
    assert [float(row["IR"]) for row in published] == [fact["IR"] for fact in facts(table)]
    assert all(row["source"].startswith(caption) for row in published)


def test_published_figures_stand_next_to_ours_at_flux(tmp_path: Path) -> None:
    texts = render(SPEC, CELLS, tmp_path, profile="flux")
    assert "paper_csv" not in texts
    assert "not comparable" not in texts["markdown"]
    (table,) = markdown_rows(texts["markdown"])
    labels = [line[1] for line in table]
    place = next(i for i, line in enumerate(table) if line[:2] == ["HPS & CLIP", "G²RPO"])
    assert labels[place + 1] == "G²RPO (paper)"
    assert [cell.replace("*", "") for cell in table[place + 1][2:5]] == [
        "0.376†",
        "0.406†",
        "3.783",
    ]
    # Flow-GRPO is not in the paper.
    assert "Flow-GRPO (paper)" not in labels
    # The paper's best is bold among the paper's, ours among ours.
    bold = [line[1] for line in table if line[0] == "HPS" and "**" in line[2]]
    assert [label.endswith("(paper)") for label in bold] == [False, True]


def latex_tabulars(text: str) -> list[tuple[int, list[list[str]]]]:
    """(number of columns, rows of cells) of each outer tabular."""
    outer = r"\\begin\{tabular\}\{@\{\}(\w+)@\{\}\}\n(.*?)\\bottomrule"
    inner = re.compile(r"\\begin\{tabular\}.*?\\end\{tabular\}")
    return [
        (
            len(columns),
            [
                re.split(r"(?<!\\)&", inner.sub("", line))
                for line in body.splitlines()
                if line.endswith(r"\\")
            ],
        )
        for columns, body in re.findall(outer, text, re.S)
    ]


@pytest.mark.parametrize(("name", "profile"), [("table1", "mini"), ("table2", "flux")])
def test_latex_rows_fill_their_columns(tmp_path: Path, name: str, profile: str) -> None:
    text = render(SPECS[name], make_table_cells(SPECS[name]), tmp_path, profile)["latex"]
    tabulars = latex_tabulars(text)
    assert len(tabulars) == (3 if profile == "mini" else 2)
    for columns, rows in tabulars:
        for row in rows:
            spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", "&".join(row))]
            assert len(row) + sum(spans) - len(spans) == columns
    assert text.count(r"\begin{") == text.count(r"\end{")
    unescaped = re.sub(r"\\[{}]", "", text)
    assert unescaped.count("{") == unescaped.count("}")
    assert text.isascii()


def test_long_tables_break_between_groups() -> None:
    table = table_of("mini/family-tuning")
    pages = re.split(r"(?=\\begin\{table\*\})", to_latex(table))[1:4]
    labels = [label for page in pages for label in re.findall(r"\\label\{(.*)\}", page)]
    assert labels == ["tab:family-tuning", "tab:family-tuning-2", "tab:family-tuning-3"]
    groups = [re.findall(r"\\textit\{Method: (.*)\}\} ", page) for page in pages]
    groups_of = [latex_escape(name) for name, _ in grouped(table.rows)]
    assert [len(names) for names in groups] == [5, 5, len(groups_of) - 10]  # of four rows each
    assert [name for names in groups for name in names] == groups_of
    assert [", continued." in page for page in pages] == [False, True, True]
    assert [r"\begin{minipage}" in page for page in pages] == [False, False, True]  # the notes


def test_latex_escapes() -> None:
    assert latex_escape("HPS & CLIP_{50%} #1 $x^2$ ~ \\") == (
        r"HPS \& CLIP\_\{50\%\} \#1 \$x\textasciicircum{}2\$ \textasciitilde{} \textbackslash{}"
    )
    assert latex_escape("G²RPO, η = 0.7, Λ ≥ 1 – λ₁") == (
        r"G\textsuperscript{2}RPO, $\eta$ = 0.7, $\Lambda$ $\geq$ 1 -- $\lambda$\textsubscript{1}"
    )
    assert latex_escape("one\n\n two\t\r\nthree\u2028four") == "one two three four"
    assert latex_escape("a\x00b\x1b[0m\x7f\x85c\ud800") == "ab[0m c"
    assert latex_escape("5\u00a0GB, Se\u0301rie: ö “ł” €, 漢") == "5~GB, Série: ö “ł” €, 漢"


@given(st.text(alphabet=st.characters(max_codepoint=0x3FF)))
def test_latex_escapes_leave_no_bare_special_character(text: str) -> None:
    # Undo what an escape may legally contain; nothing special may be left over.
    legal = r"\\[{}&%$#_]|\\[a-zA-Z]+(\{[^{}\\]*\})?|\$[^$]*\$|\{''\}|~"
    assert not re.search(r"[\\{}&%$#_^]", re.sub(legal, "", latex_escape(text)))


@given(st.text())
def test_markdown_escapes_keep_the_text_in_its_cell(text: str) -> None:
    escaped = markdown_escape(text)
    assert "\n" not in escaped
    assert not re.search(r"(?<!\\)(\\\\)*\|", escaped)
    # Any punctuation may be escaped; it reads as itself.
    read = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", escaped)
    assert read == visible(" ".join(text.split()))


@given(st.floats(0, 1e15))
def test_human_numbers_are_within_their_digits(number: float) -> None:
    text = human(number)
    if 0 < number < 0.01:
        assert text == "<0.01"
        return
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1.0)
    value = float(text.rstrip("kMGT").replace(",", "")) * scale
    assert value == pytest.approx(number, rel=0.006, abs=0.05 if number < 1 else 0.5)
    assert len(text) <= 6


def test_human_numbers_by_hand() -> None:
    shown = {n: human(n) for n in (0, 0.25, 412.3, 9876, 17_082, 999_960, 1_708_000)}
    assert list(shown.values()) == ["0", "0.25", "412", "9,876", "17.1k", "1M", "1.71M"]
    assert human(None) == "–"


def test_the_terminal_shows_scores_costs_and_gaps() -> None:
    console = Console(record=True, width=140, file=io.StringIO())
    print_table(compute_table(SPEC, CELLS, "mini", GAPS), console)
    text = console.export_text()
    mean, low, high = plain_score("hps/g2rpo", "hps") or (np.nan,) * 3
    shown = (f"{mean:.3f}†", f"[{low:.3f}, {high:.3f}]", "MixGRPO (HPS): missing, stopped at 40%.",
             "Rollout evaluations", "121k", "another model, not comparable")  # fmt: skip
    assert [words for words in shown if words not in text] == []


def test_cells_that_do_not_fit_the_table_are_refused(tmp_path: Path) -> None:
    scores = make_scores({"hps": 0.3})
    wrong = make_cell("hps/g2rpo", seed=0, scores=scores, train=("clip",))
    with pytest.raises(UserError, match=r"\['hps'\] in the table, but on \['clip'\] in its cells"):
        render(SPEC, [wrong], tmp_path)
    first = make_cell("hps/g2rpo", seed=0, scores=scores, train=("hps",))
    protocol = Protocol(name="other", hash="x")
    other = make_cell("hps/mix_grpo", seed=0, scores=scores, train=("hps",), protocol=protocol)
    with pytest.raises(UserError, match="different protocols"):
        render(SPEC, [first, other], tmp_path)
    far = make_cell(
        "hps-clip/g2rpo", seed=0, scores=scores, train=("hps", "clip"),
        protocol=Protocol(name="test-captions", hash="x"),
    )  # fmt: skip
    with pytest.raises(UserError, match="that are both named 'test-captions'"):
        render(SPEC, [first, far], tmp_path)
    fewer = make_cell(
        "hps/mix_grpo", seed=0, scores=make_scores({"hps": 0.3}, prompts=5), train=("hps",)
    )
    with pytest.raises(UserError, match="different prompts"):
        render(SPEC, [first, fewer], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": [COLUMNS[0] | {"labl": "HPS"}]}, "unknown key 'columns.0.labl'"),
        ({"costs": ["evaluations"]}, "costs.0"),
        ({"focus": ["hps/g2rpoo"]}, "no row 'hps/g2rpoo'"),
        ({"primary": {"hps/g2rpo": ["hps/mix_grp"]}}, "no row 'hps/mix_grp'"),
        (
            {"primary": {"hps/g2rpo": ["hps-clip/g2rpo"]}},
            "differ in their group or training rewards",
        ),
        ({"primary": {"hps/g2rpo": ["hps/g2rpo"]}}, "names 'hps/g2rpo' twice"),
        ({"primary": {"hps/g2rpo": []}, "baseline": None}, "primary needs a baseline"),
        ({"paper_table": None}, "paper_table is not given"),
        ({"rows": [TABLE1["rows"][0]] * 2, "focus": []}, "duplicate row 'base'"),
        (
            {"rows": [TABLE1["rows"][i] for i in (0, 1, 6, 2)], "focus": []},
            "group 'HPS' are not adjacent",
        ),
    ],
)
def test_malformed_specs_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        validate(TableSpec, TABLE1 | change, "table1.yaml: table")
    assert "\n" not in str(caught.value)


def test_the_papers_figures_are_those_of_the_source() -> None:
    paper = load_paper_tables()
    assert paper.source == "arXiv 2510.01982 v3"
    row = paper.row("table1", PaperKey(train=("HPS", "CLIP"), method="g2rpo"))
    assert dict(row.scores) == {"HPS": 0.376, "CLIP": 0.406, "PS": 0.235, "IR": 1.483, "UR": 3.783}
    assert (len(paper.table1), len(paper.table2), len(paper.table3)) == (9, 4, 4)
    # The full set of granularities is Table 1's G2RPO row, {1} its row without MGAI.
    assert paper.row("table2", PaperKey(granularities=(1, 2, 3))).scores == row.scores
    with pytest.raises(UserError, match="2 rows"):
        paper.row("table3", PaperKey(method="g2rpo"))
    with pytest.raises(UserError, match="no row"):
        paper.row("table3", PaperKey(steps=40))
