"""Runs graphs of stages: on SLURM through submitit, or on this machine.

This package does not know what a stage does: a stage is a name, its dependencies, and a payload for
the entry point named in the submission.
"""
