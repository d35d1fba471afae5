"""How Sphinx builds the site: `make docs` writes it to build/site, and warnings are errors.

The source folder is the whole repository, so that README, changelog and committed results are pages
too: what is linked in the repository is linked on the site.
"""

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS / "extensions"))

project = "g2rpo"
author = "The g2rpo authors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.napoleon",
    "autoapi.extension",
    "contents",
    "mathml",
    "plain_attributes",
]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/reference/**", "results/**/*.md"]
exclude_patterns = [".*", "build", "data", "results/runs", "**/node_modules"]
# Names that a package imports at first use, and tables that begin with a smaller heading.
suppress_warnings = ["autoapi.python_import_resolution", "myst.header"]

# Markdown as code forges show it: anchors of headings, $inline$ and ```math formulae.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

# The sections of the navigation. Of pages that are listed here, those that are there are shown; a
# page of docs/ that is not listed stands in the last section.
contents_sections = {
    "Use": ["get_started", "experiments", "scoring", "mini_world", "faq"],
    "What is computed": ["mathematics", "fidelity", "rewards", "unified_reward"],
    "Runs and reports": ["comparing", "report", "papers", "statistics", "beyond_reward"],
    "At size": ["cluster", "doctor", "containers", "training_at_size", "weights"],
    "Inside": ["extending", "policy", "rollout", "speed", "reference/g2rpo/index"],
    "The project": ["/README", "/results/mini/README", "/CONTRIBUTING", "/CHANGELOG"],
}

html_theme = "furo"
html_title = "g2rpo"
html_copy_source = False
html_extra_path = ["extra"]

# The library's modules, read without importing them: PyTorch need not be here. Left out is what
# an extension does not meet: files, leases, fetching.
autoapi_dirs = [str(ROOT / "g2rpo")]
autoapi_ignore = [
    f"*/g2rpo/{name}*"
    for name in ("attempts", "files", "hub", "lease", "owner", "progress", "stop")
]
autoapi_root = "docs/reference"
autoapi_add_toctree_entry = False
autoapi_options = ["members", "undoc-members", "show-module-summary"]
autoapi_member_order = "bysource"
napoleon_use_ivar = True  # attributes are described where their class has them, and only there
