"""Descriptions of attributes are text: napoleon takes what is before a colon for a type."""

from sphinx.application import Sphinx

BEFORE_NAPOLEON = 400  # napoleon has the usual 500


def _keep_text(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    del app, name, obj, options
    if what in ("attribute", "data") and lines:
        lines.insert(0, "")  # napoleon looks at the first line alone


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects it."""
    app.connect("autodoc-process-docstring", _keep_text, priority=BEFORE_NAPOLEON)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
