"""What is shown of runs and tables: the report page, and runs compared on the terminal.

The page is one static HTML file that opens from disk and asks no network. ``chapter`` collects an
experiment with its computed table; ``table_grids``, ``overview``, ``curves``, ``pictures`` and
``configurations`` say what is shown of it, ``view`` puts an experiment together and ``page`` the
file, within a size. ``comparison`` and ``comparison_tables`` are ``g2rpo compare``.
"""
