"""The report page, and ``g2rpo compare``.

The page is one static HTML file without network access. ``chapter`` collects an experiment with its
computed table; ``table_grids``, ``overview``, ``curves``, ``pictures`` and ``configurations`` are
the parts shown of it; ``page`` assembles them and the file, within a size limit.
``comparison`` and ``comparison_tables`` are ``g2rpo compare``.
"""
