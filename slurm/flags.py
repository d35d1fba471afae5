"""sbatch flags that a profile's ``extra`` may not set, and the key to use instead."""

import re
from collections.abc import Mapping

FlagValue = str | int | bool

_EACH_JOB = "the launcher sets it for each job; remove it"
_GPUS = "set gpus_per_node, gpu_flag and gpu_type"
_TASKS = "set gpus_per_node and tasks_per_node; the number of ranks is in a profile's hardware"
_NODES = "every single-node job would take all of them; use exclude, constraint or reservation"
OWN: Mapping[str, str] = {
    **dict.fromkeys(
        ("array", "comment", "dependency", "error", "input", "job-name", "kill-on-invalid-dep",
         "open-mode", "output"), _EACH_JOB
    ),
    **dict.fromkeys(
        ("clusters", "help", "parsable", "quiet", "test-only", "usage", "version", "wait"),
        "it changes how sbatch answers; remove it",
    ),
    **dict.fromkeys(("chdir", "wrap"), "jobs run the launcher's own script in its own folder"),
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node"), _TASKS),
    **dict.fromkeys(
        ("gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task", "ntasks-per-gpu",
         "tres-per-task"), _GPUS
    ),
    **dict.fromkeys(("mem", "mem-per-gpu"), "set memory_gb_per_task"),
    **dict.fromkeys(("cpus-per-gpu", "cpus-per-task"), "set cpus_per_task"),
    **dict.fromkeys(
        ("requeue", "no-requeue"), "jobs are requeued until done; set max_restarts to limit that"
    ),
    **dict.fromkeys(("mail-type", "mail-user"), "set mail"),
    **dict.fromkeys(
        ("export", "export-file"), "set environment; jobs inherit the submitter's as well"
    ),
    "time": "set minutes",
    "signal": "set signal_lead_seconds",
    "partition": "set partition and cpu_partition",
    "account": "set account",
    "qos": "set qos",
    "constraint": "set constraint",
    "exclusive": "set exclusive: true",
    "container": "set container",
    "nodefile": _NODES,
}  # fmt: skip
"""By long name: what to do instead."""


def refusal(name: str, value: FlagValue) -> str | None:
    """Why a flag is not allowed in ``extra``, and what to do instead; None if it is allowed.

    Whether the flag exists and its value is valid is for sbatch to say.

    Args:
        name: its long name, without the leading dashes.
        value: as in the profile; true for a flag without a value.
    """
    if name in OWN:
        return OWN[name]
    if value is False or value == "":
        return "remove it, or give it a value"
    if name == "nodelist" and re.search(r"[,\[/]", str(value)):
        return _NODES
    return None
