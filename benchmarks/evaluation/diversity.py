"""Diversity of a policy's images of one prompt, in the features of an image tower.

Rewards cannot see a policy that always draws the same picture. Two measures over the n images of a
prompt, both in float64: the mean of 1 - cosine over pairs, and the Vendi score (Friedman and
Dieng, arXiv 2210.02410), the effective number of distinct images among the n.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from benchmarks.evaluation.metrics import DISTANCE, VENDI, metric_frame
from g2rpo.data.images import load_image
from g2rpo.progress import ProgressReport
from g2rpo.rewards.image_tower import ImageTower

FloatArray = npt.NDArray[np.float64]


def unit_rows(features: npt.ArrayLike) -> FloatArray:
    """``features`` [n, D], n >= 2, with rows normalised to length 1, float64.

    Raises:
        ValueError: fewer than two rows, or a row that is zero or not finite.
    """
    matrix = np.asarray(features, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) < 2:
        raise ValueError(f"expected features [images >= 2, D], got shape {matrix.shape}")
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("an image's features are zero or not finite")
    rows: FloatArray = matrix / lengths
    return rows


def mean_pairwise_distance(features: npt.ArrayLike) -> float:
    """Mean of 1 - cosine over the pairs of n images, in [0, 2]; see :func:`unit_rows`."""
    rows = unit_rows(features)
    first, second = np.triu_indices(len(rows), k=1)
    # |a - b|^2 / 2 is 1 - cosine without cancellation for nearly identical images.
    squared = ((rows[first] - rows[second]) ** 2).sum(axis=1)
    return float(squared.mean() / 2)


def vendi_score(features: npt.ArrayLike) -> float:
    """exp of the Shannon entropy of the eigenvalues of K / n, with the cosine kernel K.

    1 for n identical images, n for n orthogonal ones; see :func:`unit_rows`.
    """
    rows = unit_rows(features)
    eigenvalues = np.linalg.eigvalsh(rows @ rows.T / len(rows))
    # Zeros are off by rounding, in either direction.
    positive = eigenvalues[eigenvalues > len(rows) * np.finfo(np.float64).eps]
    shares = positive / positive.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def measure_diversity(
    tower: ImageTower, images: Mapping[str, Sequence[Path]], name: str
) -> pd.DataFrame:
    """Rows of METRIC_TYPES: both measures of each prompt's two or more image files.

    Raises:
        UserError: an image is missing or damaged.
    """
    distances, scores = [], []
    with ProgressReport(f"diversity by {name}", len(images)) as report:
        for paths in images.values():
            pixels = [load_image(path).pixels for path in paths]
            features = tower.image_features(pixels).to(torch.float64).numpy()
            distances.append(mean_pairwise_distance(features))
            scores.append(vendi_score(features))
            report.advance()
    ids = list(images)
    return pd.concat(
        [metric_frame(DISTANCE, ids, distances), metric_frame(VENDI, ids, scores)],
        ignore_index=True,
    )
