"""``g2rpo check cluster``: whether a cluster profile fits the cluster that it describes."""
