"""Checks a cluster profile against the cluster that it describes."""
