"""The words of a table's columns beside the scores."""

from benchmarks.evaluation.metrics import DISTANCE, DRIFT, VENDI
from reproduce.experiment.table import CostColumn

COST_LABELS: dict[CostColumn, str] = {
    "rollout_evaluations": "Rollout evaluations",
    "training_forwards": "Training forwards",
    "training_backwards": "Training backwards",
    "images_scored": "Images scored",
    "device_seconds": "Device-seconds",
    "equal_cost_evaluations": "Rollout evaluations + 3 × backwards",
    "iterations": "Iterations",
}

METRIC_LABELS: dict[str, str] = {
    DISTANCE: "Image distance",
    VENDI: "Vendi score",
    DRIFT: "Drift",
}
"""The columns beside the rewards, in order; a table has those that its cells were measured in."""
