"""``python -m benchmarks.gpu_check``: everything that only a GPU can show, in a few minutes."""
