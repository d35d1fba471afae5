"""Counter-based random numbers: each draw depends only on its key.

Every draw is named by (experiment seed, stream, key...). The name is hashed with BLAKE2b to the
128-bit key of a Philox generator, so prompt order, initial noise and step noise are the same for
every method, number of ranks and batch size, whatever the order of the draws.
"""

import hashlib
import operator
from collections.abc import Sequence

import numpy as np
import torch


def generator(seed: int, stream: str, *key: int | str) -> np.random.Generator:
    """A generator for one named draw.

    Args:
        seed: the experiment's (or the evaluation's) seed.
        stream: what is drawn, e.g. ``"initial-noise"``.
        key: the counters that distinguish this draw within its stream.
    """
    # NumPy integers and strings give the same key as Python's. repr() distinguishes 1 and "1" and
    # is not confused by separators within strings.
    parts = (str(part) if isinstance(part, str) else operator.index(part) for part in key)
    name = repr((operator.index(seed), str(stream), *parts)).encode()
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def gaussian(shape: Sequence[int], seed: int, stream: str, *key: int | str) -> torch.Tensor:
    """Standard normal noise of ``shape`` for one named draw; float32, on the CPU."""
    values = generator(seed, stream, *key).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(values)


def permutation(size: int, seed: int, stream: str, *key: int | str) -> list[int]:
    """A random permutation of ``range(size)`` for one named draw."""
    return [int(index) for index in generator(seed, stream, *key).permutation(size)]
