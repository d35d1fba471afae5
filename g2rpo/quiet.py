"""Logging: our own messages at the chosen level, and no warnings from libraries."""

import logging
import os
import sys
import warnings
from importlib import import_module

LIBRARIES = ("diffusers", "transformers")
PACKAGES = ("g2rpo", "reproduce", "benchmarks", "slurm")
LEVEL_VARIABLE = "G2RPO_LOG_LEVEL"
"""The level of our own messages; workers and jobs inherit it."""


def log_level(level: str) -> None:
    """Logs our own messages from ``level`` up, here and in the processes started from here."""
    os.environ[LEVEL_VARIABLE] = level
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level)


def quiet_libraries() -> None:
    """Call once per process, before loading models."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    for library in LIBRARIES:
        # Read on import, which takes seconds and may not happen.
        os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")
        if library in sys.modules:
            import_module(f"{library}.utils.logging").set_verbosity_error()
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if level := os.environ.get(LEVEL_VARIABLE):
        log_level(level)
