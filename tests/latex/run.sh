#!/usr/bin/env bash
# Compiles every table with a real LaTeX. What is missing of TeX Live is installed where this is
# root on Debian (48 MB, half a minute); elsewhere it says so and ends with 3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

have_latex() {
    command -v pdflatex >/dev/null && command -v bibtex >/dev/null \
        && kpsewhich booktabs.sty >/dev/null && kpsewhich plainnat.bst >/dev/null
}

if ! have_latex; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "SKIPPED: no pdflatex with booktabs and natbib, and no root on Debian to install it;" \
            "install texlive-latex-recommended"
        exit 3
    fi
    echo "installing texlive-latex-recommended"
    export DEBIAN_FRONTEND=noninteractive
    packages=(--no-install-recommends texlive-latex-recommended)
    apt-get install -y -qq "${packages[@]}" >/dev/null \
        || { apt-get update -qq && apt-get install -y -qq "${packages[@]}" >/dev/null; }
fi
exec env G2RPO_LATEX=1 "${PYTHON:-python}" -m pytest tests/unit/test_latex.py "$@"
