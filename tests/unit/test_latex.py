"""Tables and bibliography through a real LaTeX, which `make test-latex` installs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cell_factory import TABLE1, TABLE2, TABLE3, make_table_cells

from benchmarks.cells import load_cells
from g2rpo.config import validate
from g2rpo.files import atomic_write_text
from reproduce.experiment import ROOT
from reproduce.render.references import BIBLIOGRAPHY, read_bibliography
from reproduce.render.spec import TableSpec
from reproduce.tables import render_table

MADE_UP = {data["name"]: data for data in (TABLE1, TABLE2, TABLE3)}
COMMITTED = sorted((ROOT / "results").glob("*/*/*.tex"))


pytestmark = pytest.mark.skipif("G2RPO_LATEX" not in os.environ, reason="make test-latex runs it")


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def compiled(folder: Path, body: str, *, bibliography: bool = False) -> str:
    """What pdflatex says of a document with ``body``."""
    packages = r"\usepackage[margin=1in]{geometry}\usepackage{booktabs}\usepackage{natbib,url}"
    document = rf"\documentclass{{article}}{packages}\begin{{document}}{body}\end{{document}}"
    atomic_write_text(folder / "main.tex", document)
    latex = ("pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex")
    said = run(folder, *latex)
    if bibliography:
        told = run(folder, "bibtex", "main")
        assert "Warning" not in told, told
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
    cells = make_table_cells(spec)
    render_table(spec, cells, profile="mini", output=tmp_path)
    body = rf"\input{{{name}.tex}}\nocite{{*}}\bibliographystyle{{plainnat}}"
    said = compiled(tmp_path, body + rf"\bibliography{{{name}}}", bibliography=True)
    check_page(said)
    assert "undefined" not in said


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
