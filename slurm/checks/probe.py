"""The checks of a trial job on its node: Python, the project, GPUs, names, disk, files, weights.

Runs in a job as ``python -m slurm.checks.probe FOLDER``: reads ``FOLDER/question.json`` and writes
its findings beside it.
"""

import importlib
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from g2rpo.files import write_json
from slurm.checks.finding import Finding, Question, Word, listed

QUESTION, ANSWERS = "question.json", "answer-*.json"


def look_around(question: Question, folder: Path, place: str) -> Iterator[Finding]:
    """The findings of this process; ``folder`` is on the disk to check."""
    if question.modules:
        yield _python(question, place)
    if question.several is not None:
        yield _names(place, "failed" if question.several else "warning")
    if question.gpus:
        yield _gpus(question.gpus, question.gpu_memory_gb, f"GPUs {place}")
    free = shutil.disk_usage(folder).free / 1e9
    if free < question.disk_gb:
        found = f"{free:.1f} GB free, about {question.disk_gb:.0f} GB needed"
        fix = "free some space, or pass --results on a larger disk"
        yield Finding("warning", f"disk {place}", found, fix)
    else:
        yield Finding("ok", f"disk {place}", f"{free:.0f} GB free")
    yield from files(question.files, place)
    if question.artifacts:
        yield _weights(question.artifacts, f"weights {place}")


def files(paths: tuple[str, ...], place: str) -> Iterator[Finding]:
    """Whether the files that jobs read exist."""
    absent = [path for path in paths if not Path(path).exists()]
    if absent:
        fix = "see `g2rpo prompts --help`; jobs need them on a shared file system, mounted"
        yield Finding("failed", f"files {place}", f"missing: {listed(absent)}", fix)
    elif paths:
        yield Finding("ok", f"files {place}", f"all {len(paths)} found")


def _python(question: Question, place: str) -> Finding:
    for name in question.modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            found = f"cannot import {name}: {_line(error)}"
            fix = "install the project in the Python that jobs use (setup:, container:)"
            return Finding("failed", f"Python {place}", found, fix)
    found = f"Python {platform.python_version()} imports {listed(question.modules)}"
    return Finding("ok", f"Python {place}", found)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _names(place: str, word: Word) -> Finding:
    from submitit.slurm.slurm import SlurmJobEnvironment  # slow to import; only jobs need it

    name = SlurmJobEnvironment().hostnames[0]
    try:
        socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        found = f"cannot resolve {name!r} ({error.strerror}); ranks connect to this first node"
        fix = "site administrator: add node names to DNS or /etc/hosts"
        return Finding(word, f"names {place}", found, fix)
    return Finding("ok", f"names {place}", "the first node's name resolves")


def _gpus(wanted: int, wanted_gb: int, what: str) -> Finding:
    import torch  # slow to import; stages without GPUs do not need it

    try:
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        problem = ""
    except (RuntimeError, AssertionError) as error:
        gpus, problem = [], f" ({_line(error)})"
    if len(gpus) < wanted:
        fix = "run `nvidia-smi` there; install a torch for its driver; pass GPUs to the container"
        return Finding(
            "failed", what, f"needs {wanted}, torch sees {len(gpus) or 'none'}{problem}", fix
        )
    return gpu_memory([(gpu.name, gpu.total_memory / 2**30) for gpu in gpus], wanted_gb, what)


def gpu_memory(gpus: list[tuple[str, float]], wanted_gb: int, what: str) -> Finding:
    """Whether GPUs, given by name and GiB, have the memory that the profile needs."""
    found = listed(f"{name}, {memory:.0f} GiB" for name, memory in gpus)
    # An 80 GB card shows 79 GiB.
    if min(memory for _, memory in gpus) < 0.95 * wanted_gb:
        fix = "use larger GPUs (gpu_type)"
        return Finding("failed", what, f"{found}; needs {wanted_gb} GB", fix)
    return Finding("ok", what, found)


def _weights(names: tuple[str, ...], what: str) -> Finding:
    from huggingface_hub import constants  # slow to import; mini needs no weights

    from g2rpo.hub.catalogue import catalogue
    from g2rpo.hub.lock import read_lock
    from g2rpo.hub.status import artifact_state

    fix = "set a shared HF_HOME under environment:, and mount it under container.mounts"
    try:
        lock = read_lock()
        chosen = [artifact for artifact in catalogue().artifacts if artifact.name in names]
        words = {artifact.name: artifact_state(artifact, lock).word for artifact in chosen}
    except Exception as error:
        return Finding("failed", what, _line(error), fix)
    absent = [name for name in names if words.get(name) not in ("cached", "locked")]
    cache = constants.HF_HUB_CACHE
    if absent:
        found = f"cached on this machine, but not in {cache} there: {listed(absent)}"
        return Finding("failed", what, found, fix)
    return Finding("ok", what, f"all {len(words)} in {cache}")


def main() -> None:
    """Writes the findings of this process to ``FOLDER/answer-RANK.json``."""
    folder = Path(sys.argv[1])
    question = Question.model_validate_json((folder / QUESTION).read_text())
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    findings = [asdict(finding) for finding in look_around(question, folder, f"on {node}")]
    write_json(folder / f"answer-{os.environ.get('SLURM_PROCID', '0')}.json", findings)


if __name__ == "__main__":
    main()
