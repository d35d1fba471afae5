"""Text, Markdown, LaTeX and CSV forms of a computed table."""

import csv
import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2

from benchmarks.evaluation.metrics import DISTANCE, DRIFT, VENDI
from benchmarks.evaluation.statistics import fixed
from g2rpo.text import CONTROLS, csv_text, visible
from reproduce.tables.spec import COST_LABELS, HACKING_LABEL, METRIC_LABELS
from reproduce.tables.values import Group, Row, Table, Value

TEMPLATES = Path(__file__).parent / "templates"

IN_DOMAIN = "†"
NOTHING = "–"

_LATEX_CHARACTERS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    '"': r"{''}",
    "–": "--",
    "—": "---",
    "−": "$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≠": r"$\neq$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "→": r"$\rightarrow$",
    "†": r"$^{\dagger}$",
    "\u00a0": "~",
}

_GREEK = re.compile(r"GREEK (SMALL|CAPITAL) LETTER (\w+)$")
_GREEK_CAPITALS = {
    "GAMMA", "DELTA", "THETA", "LAMDA", "XI", "PI", "SIGMA", "UPSILON", "PHI", "PSI", "OMEGA",
}  # fmt: skip


_T1_LETTERS = frozenset("«»ÐÞðþĄąĐđĘęĮįŊŋŲų")
"""What pdflatex prints in the font encoding T1 alone."""
_PDFLATEX = frozenset(
    set(map(chr, range(0xA0, 0x180))) - _T1_LETTERS - set("ĦħĸĿŀŉŦŧſ")
    | set("ƒȘșȚțẞ‐‑‖‘’“”‡•…‰‽⁄€™№←↑↓")
)
"""What pdflatex prints of UTF-8 without any package, beyond ASCII and what is replaced here."""
_UNSEEN = ("Cf", "Mn")
"""Categories of what joins, directs or changes other characters."""


def latex_escape(text: str) -> str:
    """``text`` as LaTeX that prints it on one line; needs no package beyond the kernel.

    Letters that pdflatex knows in UTF-8 (Latin scripts) are kept as they are. Others, of any
    script, are printed by lualatex and xelatex where the document's font has them; pdflatex prints
    a question mark for each. White space becomes one space; control characters are left out.
    """
    # A blank line would end the paragraph, which captions and table cells must not do.
    one_line = CONTROLS.sub("", re.sub(r"[^\S\u00a0]+", " ", text))
    composed = unicodedata.normalize("NFC", one_line)
    return "".join(_latex_character(character) for character in composed)


def _latex_character(character: str) -> str:
    if character in _LATEX_CHARACTERS:
        return _LATEX_CHARACTERS[character]
    if character.isascii() and character.isprintable():
        return character
    tag, _, code = unicodedata.decomposition(character).partition(" ")
    if tag in ("<super>", "<sub>"):
        inner = "".join(chr(int(part, 16)) for part in code.split())
        command = "textsuperscript" if tag == "<super>" else "textsubscript"
        return rf"\{command}{{{latex_escape(inner)}}}"
    if greek := _GREEK.match(unicodedata.name(character, "")):
        name = greek[2].replace("LAMDA", "LAMBDA").lower()
        if greek[1] == "SMALL" and name != "omicron":
            return rf"$\{name}$"
        if greek[1] == "CAPITAL" and greek[2] in _GREEK_CAPITALS:
            return rf"$\{name.capitalize()}$"
    return _by_engine(character)


def _by_engine(character: str) -> str:
    """A character as those engines print it that know it."""
    if character in _PDFLATEX:
        return character
    if character in _T1_LETTERS:
        other = rf"{{\fontencoding{{T1}}\selectfont {character}}}"
    else:
        other = "" if unicodedata.category(character) in _UNSEEN else "?"
    # \Umathchar is there in the engines whose fonts may have any character.
    return rf"\ifdefined\Umathchar {character}\else {other}\fi{{}}"


_MARKDOWN = re.compile(
    r"[\\`*_|<>\[\]~$]"
    r"|&(?=[#\w])"  # an entity
    r"|^[-+#=](?=[-+#=\s]|$)"  # a list, a heading, a rule
)


def markdown_escape(text: str) -> str:
    """``text`` as it should be read inside a Markdown table cell or sentence."""
    one_line = visible(" ".join(text.split()))
    # A number in front would begin a list.
    return re.sub(r"^(\d+)([.)]\s)", r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", one_line))


_UNITS = ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"))


def human(number: float | None) -> str:
    """A count or a number of seconds in a few characters: 9,876; 17.1k; 1.71M."""
    if number is None:
        return NOTHING
    if 0 < number < 0.01:
        return "<0.01"
    if number < 10_000:
        return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"
    scaled = [(float(f"{number / unit:.3g}"), suffix) for unit, suffix in _UNITS]
    # What rounds up to 1000 of a unit is shown in the next one.
    figure, suffix = next((pair for pair in scaled if pair[0] < 1000), scaled[-1])
    return f"{figure:g}{suffix}"


def interval_text(value: Value) -> str | None:
    """``[low, high]`` with the value's decimals, or None where there is no interval."""
    if value.interval is None:
        return None
    ends = (fixed(end, value.digits) for end in (value.interval.low, value.interval.high))
    return f"[{', '.join(ends)}]"


def seeds_text(row: Row) -> str:
    """How many seeds, or a dash for a model without any and for a gap."""
    return str(row.seeds) if row.seeds else NOTHING


def metric_labels(table: Table) -> list[str]:
    """The headings of the columns beside the rewards; none where nothing was measured."""
    labels = [METRIC_LABELS[metric] for metric in table.metrics]
    return [*labels, HACKING_LABEL] if labels else []


def metric_values(table: Table, row: Row) -> tuple[Value, ...]:
    """The row's metrics, one for each that the table shows; gaps for the paper's rows."""
    return row.metrics or tuple(Value(0) for _ in table.metrics)


def hacking_text(table: Table, row: Row) -> str:
    """``no``, ``yes`` with what fell, or a dash where it cannot be judged."""
    if row.hacking is None:
        return NOTHING
    if not row.hacking.flagged:
        return "no"
    labels = {column.reward: column.label for column in table.columns} | METRIC_LABELS
    return f"yes ({', '.join(labels[name] for name in row.hacking.fell)})"


def legend(table: Table) -> tuple[str, ...]:
    """What the marks and intervals of a table mean; only those that occur."""
    rows = [row for group in table.groups for row in group.rows]
    values = [value for row in rows for value in row.values]
    if table.paper is not None:
        values += [v for group in table.paper.groups for row in group.rows for v in row.values]
    labels = {row.interval_label for row in rows}
    sentences = []
    if any(value.in_domain for value in values):
        sentences.append(f"{IN_DOMAIN} in-domain: the row was trained on this reward.")
    if any(value.best for value in values):
        sentences.append("Bold: the best of its group, as printed.")
    if "method" in labels:
        sentences.append(
            "Method intervals: 95% t intervals over the means of the training seeds; "
            "they are about training the method again."
        )
    if "checkpoint" in labels:
        sentences.append(
            "Checkpoint intervals: 95% bootstrap intervals over prompts; they are about these "
            "trained weights alone and say nothing of another seed."
        )
    return (*sentences, *_metric_legend(table))


_METRIC_SENTENCES = {
    DISTANCE: (
        "Image distance: mean of 1 - cosine over the pairs of a prompt's images in the features "
        "of an image tower; 0 where they are all alike."
    ),
    VENDI: (
        "Vendi score (Friedman and Dieng, 2022): the effective number of different images among "
        "those of a prompt; 1 where they are all alike."
    ),
    DRIFT: (
        "Drift: mean squared difference of velocity from the base on the base's own noised "
        "samples; 0 for the base, and neither good nor bad in itself."
    ),
}


_HACKING_SENTENCE = (
    f"{HACKING_LABEL}: yes where a reward that the row trains on is above the baseline with "
    "significance while another reward or the diversity is below it (those named); p < 0.05 after "
    "Holm's correction over the row's comparisons, about what its intervals are about; "
    f"{NOTHING} where it cannot be judged."
)


def _metric_legend(table: Table) -> list[str]:
    """One sentence a metric that the table shows, and one on reward hacking."""
    if not table.metrics:
        return []
    return [*(_METRIC_SENTENCES[metric] for metric in table.metrics), _HACKING_SENTENCE]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Braces are LaTeX's own; one set of delimiters serves both templates.
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
        autoescape=False,  # noqa: S701 - the output is not HTML; the templates escape
    )
    environment.filters.update(
        md=markdown_escape,
        tex=latex_escape,
        human=human,
        interval=interval_text,
        seeds=seeds_text,
        metrics=metric_values,
        hacking=hacking_text,
    )
    return environment


def _render(template: str, table: Table) -> str:
    return (
        _environment()
        .get_template(template)
        .render(
            table=table,
            metric_labels=metric_labels(table),
            cost_labels=[COST_LABELS[cost] for cost in table.spec.costs],
            notes=(*legend(table), *table.notes),
            nothing=NOTHING,
            mark=IN_DOMAIN,
            grouped=any(group.label for group in table.groups),
        )
    )


def to_markdown(table: Table) -> str:
    """The table, its notes and, where it is not comparable, the paper's block, as Markdown."""
    return _render("table.md.j2", table)


def to_latex(table: Table) -> str:
    """A ``table*`` environment to be included by a document that loads booktabs."""
    return _render("table.tex.j2", table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.7g}"


def to_csv(table: Table) -> str:
    """One line a row, all digits: group, row, seeds, interval label, scores, metrics, costs.

    Each reward has its score, the ends of its interval, and 1 or 0 for in-domain and best. Each
    metric has its value and ends; ``hacking`` is 1, 0 or empty, ``hacking_fell`` what fell.
    """
    rewards = [column.reward for column in table.columns]
    metrics = [f"{metric}{end}" for metric in table.metrics for end in ("", "_low", "_high")]
    if metrics:
        metrics += ["hacking", "hacking_fell"]
    lines = [
        [*start, *_csv_metrics(table, row), *(_number(cost) for cost in row.costs)]
        for row, start in _csv_starts(table.groups)
    ]
    return _csv([*_CSV_HEAD, *_score_heads(rewards), *metrics, *table.spec.costs], lines)


def paper_csv(table: Table) -> str | None:
    """The paper's separate block as CSV, or None where it has none."""
    if table.paper is None:
        return None
    starts = _csv_starts(table.paper.groups, table.paper.caption)
    heads = [*_CSV_HEAD, *_score_heads(table.paper.columns)]
    return _csv(heads, [start for _, start in starts])


_CSV_HEAD = ("source", "group", "row", "label", "seeds", "interval", "missing")


def _score_heads(rewards: Sequence[str]) -> list[str]:
    ends = ("", "_low", "_high", "_in_domain", "_best")
    return [f"{reward}{end}" for reward in rewards for end in ends]


def _csv(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return buffer.getvalue()


def _csv_starts(
    groups: Sequence[Group], paper_source: str = "paper"
) -> Iterator[tuple[Row, list[str]]]:
    """Each row with the beginning of its line: what it is, and its scores."""
    for group in groups:
        for row in group.rows:
            source = paper_source if row.from_paper else "measured"
            seeds = "" if row.seeds is None else str(row.seeds)
            first = [source, group.label, row.key, row.label, seeds, row.interval_label or ""]
            scores = [text for value in row.values for text in _csv_value(value)]
            yield row, [*map(csv_text, (*first, row.gap or "")), *scores]


def _csv_metrics(table: Table, row: Row) -> list[str]:
    if not table.metrics:
        return []
    texts = [text for value in metric_values(table, row) for text in _csv_interval(value)]
    if row.hacking is None:
        return [*texts, "", ""]
    return [*texts, str(int(row.hacking.flagged)), ";".join(row.hacking.fell)]


def _csv_interval(value: Value) -> list[str]:
    ends = (None, None) if value.interval is None else (value.interval.low, value.interval.high)
    return [_number(value.mean), *(_number(end) for end in ends)]


def _csv_value(value: Value) -> list[str]:
    return [*_csv_interval(value), str(int(value.in_domain)), str(int(value.best))]
