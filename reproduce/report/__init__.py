"""The report: experiments as one static HTML page that opens from disk and asks no network.

``chapter`` collects an experiment, ``grids``, ``curves``, ``pictures``, ``configurations`` and
``provenance`` say what is shown of it, ``page`` puts it into one file within a size.
"""
