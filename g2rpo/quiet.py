"""Silences the libraries' warnings, so that logs have only our own lines."""

import logging
import os
import sys
import warnings
from importlib import import_module

LIBRARIES = ("diffusers", "transformers")


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
