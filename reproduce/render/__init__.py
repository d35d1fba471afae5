"""From cells and a table's description to Markdown, CSV, LaTeX and the terminal."""
