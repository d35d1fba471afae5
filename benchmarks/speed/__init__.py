"""Timed benchmarks of single parts, each a module to be run: ``python -m benchmarks.speed.X``."""
