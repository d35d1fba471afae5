"""Where work runs: graphs of stages on SLURM through submitit, or on this machine.

Nothing here knows what a stage does: it is a name, what it needs, and a payload that the entry
point named in the submission understands.
"""
