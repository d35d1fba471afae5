"""What a trial job finds where it runs: Python, the project, GPUs, names, disk, files, weights.

Started in a job as ``python -m slurm.doctor.probe FOLDER``; ``FOLDER/question.json`` says what is
looked for, and the answer is written beside it.
"""

import importlib
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

QUESTION = "question.json"
ANSWERS = "answer-*.json"


def probe(folder: Path) -> None:
    """Writes what this process finds to ``folder/answer-RANK.json``."""
    question = json.loads((folder / QUESTION).read_text())
    answer: dict[str, Any] = {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "python": platform.python_version(),
        "free_gb": shutil.disk_usage(folder).free / 1e9,
        "absent": [path for path in question["files"] if not Path(path).exists()],
        "modules": {
            name: _problem(partial(importlib.import_module, name)) for name in question["modules"]
        },
        "meeting": _problem(_resolve),
        "artifacts": {},
        "gpus": [],
    }
    if question["artifacts"]:
        answer["artifacts_problem"] = _problem(
            lambda: answer.update(_artifacts(question["artifacts"]))
        )
    if question["gpus"]:
        answer["gpus_problem"] = _problem(lambda: answer.update(gpus=_gpus()))
    from g2rpo.files import write_json

    write_json(folder / f"answer-{os.environ.get('SLURM_PROCID', '0')}.json", answer)


def _problem(action: Callable[[], object]) -> str:
    """What an action raises, in one line; empty where it succeeds."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def _resolve() -> None:
    """Ranks meet at the first node's name."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    name = SlurmJobEnvironment().hostnames[0]
    try:
        socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(f"{name!r}: {error.strerror}") from None


def _gpus() -> list[dict[str, Any]]:
    import torch

    return [
        {"name": found.name, "memory_gb": found.total_memory / 2**30}
        for found in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def _artifacts(names: list[str]) -> dict[str, Any]:
    from huggingface_hub import constants

    from g2rpo.hub.catalogue import catalogue
    from g2rpo.hub.lock import read_lock
    from g2rpo.hub.status import artifact_state

    lock = read_lock()
    chosen = [artifact for artifact in catalogue().artifacts if artifact.name in names]
    words = {artifact.name: artifact_state(artifact, lock).word for artifact in chosen}
    return {"artifacts": words, "cache": constants.HF_HUB_CACHE}


if __name__ == "__main__":
    probe(Path(sys.argv[1]))
