"""The package hpsv2, made to run beside today's libraries without a network."""

import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import open_clip


@contextmanager
def replaced_modules(replaced: Mapping[str, Any]) -> Iterator[None]:
    """Other modules under these names; unlike under ``patch.dict``, what is imported stays."""
    before = {name: sys.modules.get(name) for name in replaced}
    sys.modules.update(replaced)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextmanager
def hpsv2_open_clip() -> Iterator[Any]:
    """hpsv2's own copy of open_clip, ``hpsv2.src.open_clip``.

    hpsv2 1.2.0 lacks a file of its tokenizer and imports tkinter's turtle.
    """
    # Its tokenizer is open_clip's, but its word list is not in the wheel.
    faults = {
        "hpsv2.src.open_clip.tokenizer": open_clip.tokenizer,
        "turtle": types.SimpleNamespace(forward=None),
    }
    with replaced_modules(faults):
        import hpsv2.src.open_clip as vendored

        yield vendored
