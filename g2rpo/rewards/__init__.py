"""Reward models: one file each, one protocol (``base``), one registry line (``registry``)."""
