"""Training: advantages, objective, loop, checkpoints."""
