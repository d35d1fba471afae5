"""The flags of sbatch: what a profile's ``extra`` may hold, and which keys stand for the others."""

import re
from collections.abc import Mapping

FlagValue = str | int | bool

_EACH_JOB = "the launcher sets it for each job; leave it out"
_GPUS = "set gpus_per_node, gpu_flag and gpu_type"
_TASKS = "set gpus_per_node and tasks_per_node; a profile's hardware has the ranks"
_MEMORY = "set memory_gb_per_task"
_CPUS = "set cpus_per_task"
_REQUEUE = "jobs are requeued until they are done; max_restarts limits how often"
_ANSWER = "sbatch would not answer with the id of a job that runs; leave it out"
OWN: Mapping[str, str] = {
    **dict.fromkeys(
        ("array", "comment", "dependency", "error", "input", "job-name", "kill-on-invalid-dep",
         "open-mode", "output"), _EACH_JOB
    ),
    **dict.fromkeys(
        ("clusters", "help", "parsable", "quiet", "test-only", "usage", "version", "wait"), _ANSWER
    ),
    **dict.fromkeys(("chdir", "wrap"), "jobs run the launcher's own script where it was started"),
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node"), _TASKS),
    **dict.fromkeys(
        ("gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task", "ntasks-per-gpu",
         "tres-per-task"), _GPUS
    ),
    **dict.fromkeys(("mem", "mem-per-gpu"), _MEMORY),
    **dict.fromkeys(("cpus-per-gpu", "cpus-per-task"), _CPUS),
    **dict.fromkeys(("requeue", "no-requeue"), _REQUEUE),
    **dict.fromkeys(("mail-type", "mail-user"), "set mail"),
    **dict.fromkeys(("export", "export-file"), "set environment; a job has the submitter's too"),
    "time": "set minutes",
    "signal": "set signal_lead_seconds",
    "partition": "set partition and cpu_partition",
    "account": "set account",
    "qos": "set qos",
    "constraint": "set constraint",
    "exclusive": "set exclusive: true",
    "container": "set container",
    "nodefile": "jobs of one node would take them all; use exclude, constraint or reservation",
}  # fmt: skip
"""What cannot be given in ``extra``, and what to do instead."""
_PLAIN = frozenset({
    "contiguous", "hold", "ignore-pbs", "overcommit", "reboot", "spread-job", "stepmgr",
    "oversubscribe", "use-min-nodes", "verbose",
})  # fmt: skip
_EITHER = frozenset({
    "get-user-env", "nice", "no-kill", "oom-kill-step", "propagate", "resv-ports",
})  # fmt: skip
_VALUED = frozenset({
    "acctg-freq", "batch", "bb", "bbf", "begin", "cluster-constraint", "container-id", "core-spec",
    "cores-per-socket", "cpu-freq", "deadline", "delay-boot", "distribution", "exclude", "extra",
    "extra-node-info", "gid", "gpu-bind", "gpu-freq", "gres", "gres-flags", "hint", "licenses",
    "mcs-label", "mem-bind", "mem-per-cpu", "mincpus", "network", "nodelist", "ntasks-per-core",
    "ntasks-per-socket", "power", "prefer", "priority", "profile", "reservation", "segment",
    "sockets-per-node", "switches", "thread-spec", "threads-per-core", "time-min", "tmp", "uid",
    "wait-all-nodes", "wckey",
})  # fmt: skip
"""Flags of sbatch (22.05 to 25.05) by whether they take a value."""
KNOWN = frozenset(OWN) | _PLAIN | _EITHER | _VALUED


def refusal(name: str, value: FlagValue) -> str | None:
    """Why a flag cannot stand in ``extra``, and what to do instead; None where it can.

    Args:
        name: its long name, without the dashes in front.
        value: as in the profile; true for a flag without a value.
    """
    if name in OWN:
        return OWN[name]
    if value is False or value == "":
        return "leave it out, or give it a value"
    if name in _PLAIN and value is not True:
        return "it takes no value: write true"
    if name in _VALUED and value is True:
        return "it needs a value"
    if name == "nodelist" and re.search(r"[,\[/]", str(value)):
        return "jobs of one node would take them all; use exclude, constraint or reservation"
    return None
