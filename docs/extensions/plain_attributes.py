"""Keeps attribute descriptions as text: napoleon would read words before a colon as a type."""

from sphinx.application import Sphinx

BEFORE_NAPOLEON = 400  # napoleon runs at 500


def _keep_text(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    del app, name, obj, options
    if what in ("attribute", "data") and lines:
        lines.insert(0, "")  # napoleon parses only the first line


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the hook."""
    app.connect("autodoc-process-docstring", _keep_text, priority=BEFORE_NAPOLEON)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
