"""Sphinx configuration: `make docs` builds the site in build/site and treats warnings as errors.

The source folder is the whole repository, so README, changelog and committed results are pages
too, and links work in the repository and on the site. docs/generate.py writes docs/generated.
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
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/generated/*.md",
    "docs/reference/**",
    "results/**/*.md",
]
exclude_patterns = [".*", "build", "data", "results/runs", "**/node_modules"]
# Names that a package imports on first use, and tables that start with a lower heading.
suppress_warnings = ["autoapi.python_import_resolution", "myst.header"]

# Markdown as code forges render it: heading anchors, $inline$ and ```math formulas.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

# The sections of the navigation. Listed pages are shown if they exist; any other page of docs/ is
# in the last section.
contents_sections = {
    "Use": ["get_started", "experiments", "measured", "results", "faq"],
    "Images": ["scoring", "rewards", "weights"],
    "Clusters": ["cluster", "containers", "flux"],
    "Methods": ["extending", "policy", "mathematics", "fidelity", "statistics", "mini_world"],
    "Reference": [
        "generated/cli",
        "generated/config",
        "Python <reference/g2rpo/index>",
    ],
    "Project": ["README </README>", "/results/mini/README", "/CONTRIBUTING", "/CHANGELOG"],
}

html_theme = "furo"
html_title = "g2rpo"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["extra"]

# The modules that extensions use or the mathematics names; the rest is internal. They are parsed,
# not imported, so Sphinx's environment needs no PyTorch.
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
            "loop",
            "metrics",
            "objective",
            "rollout",
        ),
        *("transitions", "update"),
    },
}


def _internal() -> list[str]:
    modules = (ROOT / "g2rpo").rglob("*.py")
    return [
        str(path)
        for path in modules
        if path.stem not in REFERENCE.get(path.parent.name, set())
        and not (path.stem == "__init__" and path.parent.name in REFERENCE)
    ]


autoapi_dirs = [str(ROOT / "g2rpo")]
autoapi_ignore = _internal()
autoapi_root = "docs/reference"
autoapi_add_toctree_entry = False
autoapi_options = ["members", "undoc-members", "show-module-summary"]
autoapi_member_order = "bysource"
napoleon_use_ivar = True  # describe attributes in their class only
