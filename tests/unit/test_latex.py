"""Tables and bibliography through a real LaTeX, which `make test-latex` installs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cell_factory import TABLE1, TABLE2, TABLE3, make_table_cells, render

from benchmarks.evaluation.results import load_cells
from g2rpo.config import validate
from g2rpo.files import atomic_write_text
from reproduce.experiment import ROOT
from reproduce.experiment.table import TableSpec
from reproduce.tables.latex import latex_escape
from reproduce.tables.references import BIBLIOGRAPHY, read_bibliography

MADE_UP = {data["name"]: data for data in (TABLE1, TABLE2, TABLE3)}
COMMITTED = sorted((ROOT / "results").glob("*/*/*.tex"))


pytestmark = pytest.mark.skipif("G2RPO_LATEX" not in os.environ, reason="make test-latex runs it")


def run(folder: Path, *command: str) -> str:
    # TeX folds its lines within characters.
    done = subprocess.run(
        command, check=False, cwd=folder, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def compiled(
    folder: Path, body: str, *, bibliography: bool = False, engine: str = "pdflatex"
) -> str:
    """What ``engine`` says of a document with ``body``."""
    packages = r"\usepackage[margin=1in]{geometry}\usepackage{booktabs}\usepackage{natbib,url}"
    document = rf"\documentclass{{article}}{packages}\begin{{document}}{body}\end{{document}}"
    atomic_write_text(folder / "main.tex", document)
    latex = (engine, "-interaction=nonstopmode", "-halt-on-error", "main.tex")
    said = run(folder, *latex)
    if bibliography:
        log = run(folder, "bibtex", "main")
        assert "Warning" not in log, log
        run(folder, *latex)
        said = run(folder, *latex)
    return said


def check_page(said: str) -> None:
    """Nothing sticks out of the page, to the side or below."""
    assert "Overfull" not in said
    assert "too large for page" not in said


@pytest.mark.parametrize("name", list(MADE_UP))
def test_made_up_tables_compile(tmp_path: Path, name: str) -> None:
    notes = (r"50% of $5 & {x_1} #2 ~ ^ \ < > | η² Λ ≥ –",)
    spec = validate(TableSpec, MADE_UP[name], name).model_copy(update={"notes": notes})
    render(spec, make_table_cells(spec), tmp_path)
    body = rf"\input{{{name}.tex}}\nocite{{*}}\bibliographystyle{{plainnat}}"
    said = compiled(tmp_path, body + rf"\bibliography{{{name}}}", bibliography=True)
    check_page(said)
    assert "undefined" not in said


LABELS = (
    "a blank\n\nline, a\x0cform feed, a \x00null",
    "Łódź, Série, “ł” €, η² λ₁ Λ ≈ ≠ ∞ →",
    "".join(map(chr, (*range(0x20, 0x7F), *range(0xC0, 0xD0)))),
)
SCRIPTS = "Ελλάδα, emoji 😀 ❤️ 👩‍👩‍👧, 漢字, 한국어, العربية, עברית, हिन्दी, Ж, «citát», Ħal, ŉ, ſ, ∉"


@pytest.mark.parametrize(
    ("label", "engine"),
    [(label, "pdflatex") for label in LABELS]
    + [(label, engine) for label in (LABELS[1], SCRIPTS) for engine in ("lualatex", "xelatex")],
)
def test_any_label_compiles(tmp_path: Path, label: str, engine: str) -> None:
    if engine != "pdflatex" and not has_engine(tmp_path, engine):
        pytest.skip(f"no working {engine}")
    escaped = latex_escape(label)
    body = rf"\begin{{table}}\caption{{{escaped}}}\begin{{tabular}}{{p{{3in}}}}{escaped} \\"
    compiled(tmp_path, rf"{body}\end{{tabular}}\end{{table}}", engine=engine)


def has_engine(folder: Path, engine: str) -> bool:
    """Whether ``engine`` is installed with what it needs for an empty document."""
    if shutil.which(engine) is None:
        return False
    try:
        compiled(folder, "a", engine=engine)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_tables_compile(tmp_path: Path, path: Path) -> None:
    shutil.copy(path, tmp_path / "table.tex")
    check_page(compiled(tmp_path, r"\input{table.tex}"))


def test_every_reference_is_typeset(tmp_path: Path) -> None:
    shutil.copy(BIBLIOGRAPHY, tmp_path / "all.bib")
    body = r"\nocite{*}\bibliographystyle{plainnat}\bibliography{all}"
    compiled(tmp_path, body, bibliography=True)
    listed = re.findall(r"\\bibitem\[.*?\]\{(\w+)\}", (tmp_path / "main.bbl").read_text(), re.S)
    assert sorted(listed) == sorted(read_bibliography())


def test_committed_tables_are_all_found() -> None:
    assert len(COMMITTED) >= len([p for p in (ROOT / "results").glob("*/*/cells") if load_cells(p)])
