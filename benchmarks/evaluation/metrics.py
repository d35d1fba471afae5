"""Metrics besides the scores: one number per prompt, over some of the prompts."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from g2rpo.errors import UserError

DISTANCE = "diversity/distance"
VENDI = "diversity/vendi"
DRIFT = "drift"
METRIC_TYPES = {"prompt_id": "str", "metric": "str", "value": "float64"}
"""The columns of metrics."""


def metric_frame(metric: str, prompt_ids: Sequence[str], values: npt.ArrayLike) -> pd.DataFrame:
    """One row per prompt with the columns of :data:`METRIC_TYPES`."""
    return pd.DataFrame(
        {"prompt_id": list(prompt_ids), "metric": metric, "value": np.asarray(values, np.float64)}
    )


def checked_frame(frame: pd.DataFrame, types: Mapping[str, str], where: str) -> pd.DataFrame:
    """The columns ``types`` of ``frame``, with these types and in one order.

    Args:
        frame: one row per prompt and reward or metric.
        types: column to dtype: ``prompt_id``, then the reward or metric, then the value.
        where: prefix of an error.

    Raises:
        UserError: a column is missing, or a value is duplicated or not finite.
    """
    prompt_id, name, value = list(types)[:3]
    missing = [column for column in types if column not in frame.columns]
    if missing:
        raise UserError(f"{where}: missing column {missing[0]!r}")
    kept = frame.loc[:, list(types)].astype(dict(types))
    kept = kept.sort_values([name, prompt_id], ignore_index=True)
    faults = {
        "is not finite": ~np.isfinite(kept[value]),
        "occurs twice": kept.duplicated([prompt_id, name]),
    }
    for fault, rows in faults.items():
        for first in kept.loc[rows].head(1).to_dict("records"):
            raise UserError(
                f"{where}: the {value} of prompt {first[prompt_id]!r} under {first[name]!r} {fault}"
            )
    return kept
