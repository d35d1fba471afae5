"""``g2rpo check cluster``: whether a cluster profile fits its cluster."""
