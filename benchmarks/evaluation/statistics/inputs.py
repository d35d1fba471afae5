"""Checks of what the statistics are given, and the sizes they share."""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

CHUNK_ELEMENTS = 4_000_000
"""Resampled entries held in memory at once (32 MB as float64)."""


def _finite(values: FloatArray) -> FloatArray:
    if not np.isfinite(values).all():
        raise ValueError(f"a value is not finite in an array of shape {values.shape}")
    return values


def as_matrix(values: npt.ArrayLike, least: int, unit: str) -> FloatArray:
    """Finite [quantities, units] as float64.

    Raises:
        ValueError: another shape, fewer than ``least`` units, or a value that is not finite.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"expected [quantities, {unit}], got an array of shape {matrix.shape}")
    if matrix.shape[1] < least:
        raise ValueError(f"needs at least {least} {unit}, got {matrix.shape[1]}")
    return _finite(matrix)


def as_cube(values: npt.ArrayLike) -> FloatArray:
    """Finite [quantities, seeds, prompts] as float64.

    Raises:
        ValueError: another shape, no seed, no prompt, or a value that is not finite.
    """
    cube = np.asarray(values, dtype=np.float64)
    if cube.ndim != 3 or 0 in cube.shape[1:]:
        raise ValueError(f"expected [quantities, seeds, prompts], got shape {cube.shape}")
    return _finite(cube)


def paired_differences(
    first: npt.ArrayLike, second: npt.ArrayLike, least: int, unit: str
) -> tuple[FloatArray, FloatArray]:
    """Differences, and the size below which one is only rounding of the scores it comes from.

    Returns:
        [quantities, units] and [quantities].

    Raises:
        ValueError: the shapes differ, or a matrix is refused by :func:`as_matrix`.
    """
    one, two = as_matrix(first, least, unit), as_matrix(second, least, unit)
    if one.shape != two.shape:
        raise ValueError(f"not paired: shapes {one.shape} and {two.shape} differ")
    return one - two, np.maximum(rounding_of(one), rounding_of(two))


def rounding_of(matrix: FloatArray) -> FloatArray:
    """The size below which a mean of each row of [quantities, units] is only rounding."""
    size: FloatArray = 8 * np.finfo(np.float64).eps * np.abs(matrix).max(axis=1)
    return size


def paired_cubes(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Two [quantities, seeds, prompts] of one shape; a model without seeds is repeated.

    Raises:
        ValueError: they differ in quantities, in prompts, or in seeds where neither has one only.
    """
    one, two = as_cube(first), as_cube(second)
    seeds = {one.shape[1], two.shape[1]} - {1}
    if one.shape[0] != two.shape[0] or one.shape[2] != two.shape[2] or len(seeds) > 1:
        raise ValueError(f"not paired: shapes {one.shape} and {two.shape} differ")
    shape = (one.shape[0], max(one.shape[1], two.shape[1]), one.shape[2])
    return np.broadcast_to(one, shape), np.broadcast_to(two, shape)
