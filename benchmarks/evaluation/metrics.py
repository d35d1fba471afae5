"""What is measured of a policy beside its scores: one number a prompt, over some of the prompts."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from g2rpo.errors import UserError

DISTANCE = "diversity/distance"
VENDI = "diversity/vendi"
DRIFT = "drift"
METRIC_COLUMNS = ("prompt_id", "metric", "value")


def metric_frame(metric: str, prompt_ids: Sequence[str], values: npt.ArrayLike) -> pd.DataFrame:
    """One row a prompt with :data:`METRIC_COLUMNS`; the values are float64."""
    return pd.DataFrame(
        {"prompt_id": list(prompt_ids), "metric": metric, "value": np.asarray(values, np.float64)}
    )


def checked_metrics(metrics: pd.DataFrame, prompts: Collection[str], where: str) -> pd.DataFrame:
    """``metrics`` in one order and with its own types.

    Args:
        metrics: rows with :data:`METRIC_COLUMNS`.
        prompts: the ids that may occur.
        where: stands before an error.

    Raises:
        UserError: a column is missing, or a value is doubled, not finite or of another prompt.
    """
    absent = [column for column in METRIC_COLUMNS if column not in metrics.columns]
    if absent:
        raise UserError(f"{where}: the metrics have no column {absent[0]!r}")
    types = {"prompt_id": "str", "metric": "str", "value": "float64"}
    kept = metrics.loc[:, list(METRIC_COLUMNS)].astype(types)
    kept = kept.sort_values(["metric", "prompt_id"], ignore_index=True)
    faults = {
        "is not finite": ~np.isfinite(kept["value"]),
        "is there twice": kept.duplicated(["prompt_id", "metric"]),
        "is of a prompt without scores": ~kept["prompt_id"].isin(list(prompts)),
    }
    for fault, found in faults.items():
        if found.any():
            first = kept.loc[found].iloc[0]
            raise UserError(
                f"{where}: {first['metric']!r} of prompt {first['prompt_id']!r} {fault}"
            )
    return kept
