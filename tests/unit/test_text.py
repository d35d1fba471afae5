"""Text of users and printed numbers: what a table, page or terminal makes of them."""

import io
import re
import string
from pathlib import Path

import jinja2
import pandas as pd
import pytest
from cell_factory import TABLE1, csv_rows, make_table_cells, render
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.box import SIMPLE_HEAD, Box
from rich.console import Console

from benchmarks.evaluation.scoring import summary
from benchmarks.evaluation.statistics import ALPHA, p_text, signed
from g2rpo.config import validate
from g2rpo.terminal import PlainTable
from g2rpo.text import csv_text, excerpt, plain_value, visible
from reproduce.experiment.table import TableSpec
from reproduce.tables.markdown import markdown_escape

HOSTILE = (
    "[photo]",
    "[/anime]",
    "[bold red]x[/]",
    ":cat:",
    "a | b `c` <b>d</b> $e$ ~~f~~ &lt;",
    "\x1b[2J\x1b[31mred\x07",
    "\u202eltr\u2066",
    "two\nlines\r\n\tof text",
    "=1+1",
    "all",
)


@pytest.mark.parametrize(
    ("p_value", "text"),
    [
        (0.0, "< 0.001"),
        (0.00099, "< 0.001"),
        (0.001, "0.001"),
        (0.0494, "0.049"),
        (0.0496, "< 0.05"),
        (0.04999999, "< 0.05"),
        (0.05, "0.050"),
        (0.0504, "0.050"),
        (1.0, "1.000"),
        (float("nan"), "–"),
    ],
)
def test_a_p_value_reads_as_it_is_marked(p_value: float, text: str) -> None:
    assert p_text(p_value) == text


@given(st.floats(0, 1))
def test_a_p_value_never_contradicts_its_mark(p_value: float) -> None:
    text = p_text(p_value)
    assert (text.startswith("<") or float(text) < ALPHA) == (p_value < ALPHA)


@given(st.floats(-1e6, 1e6), st.integers(0, 6))
def test_a_difference_keeps_its_sign(difference: float, digits: int) -> None:
    shown = signed(difference, digits)
    assert (shown[0] == "+", shown[0] == "-") == (difference > 0, difference < 0)
    assert (float(shown) == 0) == (difference == 0)


def scores(styles: list[str]) -> pd.DataFrame:
    """Two prompts of each style, the first of them with two images."""
    rows = [
        {"reward": "hps", "style": style, "prompt_id": f"{number}{part}", "score": score}
        for number, style in enumerate(styles)
        for part, score in (("a", 0.1), ("a", 0.3), ("b", 0.7123456))
    ]
    return pd.DataFrame(rows)


def printed(frame: pd.DataFrame, width: int) -> str:
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    summary.show(summary.summarise(frame), {"hps": ["[/id]", "\x1b[31m"]}, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    # What rich itself writes for its styles.
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("width", [20, 30, 40, 80, 500])
def test_the_summary_shows_any_style_and_whole_numbers(width: int) -> None:
    text = printed(scores(list(HOSTILE)), width)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)
    assert text.count("0.4562") == len(HOSTILE) + 1
    words = set(text.split())
    for style in HOSTILE:
        assert all(len(word) > 15 or word in words for word in visible(style).split())
    if width == 500:
        assert len(text.splitlines()) == 3 + 2 + len(HOSTILE) + 1


def test_every_number_of_the_summary_is_over_prompts() -> None:
    lines = summary.summarise(scores(["all", "photo"]))
    assert [line.style for line in lines] == [None, "all", "photo"]
    # Prompt means 0.2 and 0.7123456: the deviation of two numbers is their distance over root two.
    for line in lines[1:]:
        assert (line.images, line.prompts) == (3, 2)
        assert line.mean == pytest.approx((0.2 + 0.7123456) / 2)
        assert line.std == pytest.approx((0.7123456 - 0.2) / 2**0.5)
    (alone,) = summary.summarise(scores(["x"]).head(2))
    assert (alone.std, alone.interval) == (None, None)


def test_the_summary_as_csv_has_no_formula_and_a_total_of_its_own() -> None:
    text = summary.as_csv(summary.as_frame(summary.summarise(scores(["=1+1", "all"]))))
    rows = csv_rows(text)
    assert [row["style"] for row in rows] == ["", "'=1+1", "all"]
    assert float(rows[0]["mean"]) == pytest.approx(0.4561728)


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        *((text, f"'{visible(text)}") for text in ("=A1", "+a", "-a", "@a", "\ta", "\r=a", "＝1")),
        *((text, text) for text in ("a=1", "-0.5", "+1e-3", "", " a", "[photo]")),
    ],
)
def test_text_that_begins_like_a_formula_is_no_formula(text: str, cell: str) -> None:
    assert csv_text(text) == cell


def plain(text: str) -> str:
    """What a reader sees of inline Markdown in a list and in a table."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    found = []
    for source in (f"- {text}", f"| {text} | b |\n|---|---|"):
        inline = [token for token in parser.parse(source) if token.type == "inline"]
        children = inline[0].children or []
        assert {child.type for child in children} <= {"text", "text_special"}
        found.append("".join(child.content for child in children))
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("text", [*HOSTILE, "# a", "- a", "1. a", "---", "+", "![a](b)", "<!-- a"])
def test_markdown_shows_the_text(text: str) -> None:
    assert plain(markdown_escape(text)) == visible(" ".join(text.split()))


def test_a_template_shows_text_and_keeps_markup() -> None:
    environment = jinja2.Environment(autoescape=True, finalize=plain_value)
    html = environment.from_string("{{ a }} {{ b|safe }} {{ c }}").render(
        a="<b>\u202e\x1b", b="<i>", c=1
    )
    assert html == "&lt;b&gt;\\u202e\\x1b <i> 1"


@pytest.mark.parametrize("label", [HOSTILE[4], "\x1b[31m\u202e=x", "=x"])
def test_labels_stay_in_their_cells_in_every_format(label: str, tmp_path: Path) -> None:
    rows = [{**row, "label": label, "group": label} for row in TABLE1["rows"][:2]]
    spec = validate(
        TableSpec,
        {**TABLE1, "rows": rows, "title": label, "focus": [], "baseline": None},
        "made up",
    )
    texts = render(spec, make_table_cells(spec), tmp_path)
    for kind in ("markdown", "csv", "latex"):
        text = texts[kind]
        assert not re.search(r"[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)
        if kind == "csv":
            assert {row["label"] for row in csv_rows(text)} == {csv_text(label)}


@pytest.mark.parametrize("width", [16, 20, 40, 60, 100, 1000])
@pytest.mark.parametrize("box", [None, SIMPLE_HEAD])
def test_a_narrow_table_cuts_no_number(width: int, box: Box | None) -> None:
    table = PlainTable(pad_edge=False, title="A title of the table", box=box)
    for name in ("a long heading", "mean", "difference", "interval"):
        table.add_column(name, justify="right")
    figures = ["0.71234", "+12,345.6789", "-0.00012", "1.234567e-08"]
    for label in ("short", "g2rpo-hps-seed1-0123456789ab", "a label of several words"):
        table.add_row(label, figures[0], figures[1], f"{figures[2]} to {figures[3]}", style="dim")
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for figure in figures:
        assert text.split().count(figure) == 3


@given(st.text(alphabet=string.printable, max_size=500))
def test_an_excerpt_is_one_short_line(text: str) -> None:
    line = excerpt(text)
    assert len(line) <= 200 and "\n" not in line
    assert " ".join(text.split()).endswith(line.removeprefix("…"))
