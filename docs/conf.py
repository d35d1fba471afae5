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
author = project_copyright = "The g2rpo authors"
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
    "What is computed": ["mathematics", "credit", "fidelity", "rewards", "unified_reward"],
    "Runs and reports": ["comparing", "report", "papers", "statistics", "beyond_reward"],
    "At size": ["cluster", "check", "containers", "training_at_size", "weights"],
    "Inside": ["extending", "policy", "rollout", "speed", "API reference <reference/g2rpo/index>"],
    "The project": ["README </README>", "/results/mini/README", "/CONTRIBUTING", "/CHANGELOG"],
}

html_theme = "furo"
html_title = "g2rpo"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["extra"]

# The library's modules, read without importing them: PyTorch need not be here. Those that an
# extension or a reader of the mathematics meets; the rest is plumbing.
REFERENCE = {
    "g2rpo": {"config", "errors", "sampling", "seeds"},
    "data": {"prompts"},
    "flow": {"rollout_tree", "granularity", "schedule", "sweep", "transition"},
    "methods": {"base", "dance_grpo", "flow_grpo", "g2rpo", "mix_grpo", "presets"},
    "policy": {"conditioning", "config", "flux"},
    "rewards": {"base", "clip_score", "preprocessing", "registry", "weights"},
    "training": {
        *(
            "advantages",
            "config",
            "granularity_reduction",
            "loop",
            "metrics",
            "objective",
            "rollout",
        ),
        *("transitions", "update"),
    },
}


def _plumbing() -> list[str]:
    modules = (ROOT / "g2rpo").rglob("*.py")
    return [
        str(path)
        for path in modules
        if path.stem not in REFERENCE.get(path.parent.name, set())
        and not (path.stem == "__init__" and path.parent.name in REFERENCE)
    ]


autoapi_dirs = [str(ROOT / "g2rpo")]
autoapi_ignore = _plumbing()
autoapi_root = "docs/reference"
autoapi_add_toctree_entry = False
autoapi_options = ["members", "undoc-members", "show-module-summary"]
autoapi_member_order = "bysource"
napoleon_use_ivar = True  # attributes are described where their class has them, and only there
