"""What a trial job finds where it runs: Python, the project, GPUs, names, disk, files, weights.

Started in a job as ``python -m slurm.checks.probe FOLDER``; ``FOLDER/question.json`` says what is
looked for, and the findings are written beside it.
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

from g2rpo.config import StrictModel
from g2rpo.files import write_json
from slurm.checks.finding import Finding, listed

QUESTION, ANSWERS = "question.json", "answer-*.json"


class Question(StrictModel):
    """What is looked for.

    Attributes:
        modules: what Python must import.
        files: what must be there.
        artifacts: published weights that must be cached.
        gpus: whether the process has been given a GPU.
        gpu_memory_gb: memory that each GPU must have.
        disk_gb: free space below which a warning is worth it.
        several: whether ranks of one stage meet on several processes; None does not look.
    """

    modules: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    artifacts: tuple[str, ...] = ()
    gpus: bool = False
    gpu_memory_gb: int = 0
    disk_gb: float = 1.0
    several: bool | None = None


def look_around(question: Question, folder: Path, place: str) -> Iterator[Finding]:
    """The findings of this process; ``folder`` is on the disk that is looked at."""
    if question.modules:
        yield _python(question, place)
    if question.several is not None:
        yield _names(place, "failed" if question.several else "warning")
    if question.gpus:
        yield _gpus(question.gpu_memory_gb, f"GPUs {place}")
    free = shutil.disk_usage(folder).free / 1e9
    if free < question.disk_gb:
        found = f"{free:.1f} GB free, {question.disk_gb:.0f} GB are likely to be needed"
        fix = "free some, or --results on a larger disk"
        yield Finding("warning", f"disk {place}", found, fix)
    else:
        yield Finding("ok", f"disk {place}", f"{free:.0f} GB free")
    yield from files(question.files, place)
    if question.artifacts:
        yield _weights(question.artifacts, f"weights {place}")


def files(paths: tuple[str, ...], place: str) -> Iterator[Finding]:
    """Whether what jobs read is there."""
    absent = [path for path in paths if not Path(path).exists()]
    if absent:
        fix = "`g2rpo prompts --help`; a job's must be on a shared file system, or mounted"
        yield Finding("failed", f"files {place}", f"not there: {listed(absent)}", fix)
    elif paths:
        yield Finding("ok", f"files {place}", f"all {len(paths)} there")


def _python(question: Question, place: str) -> Finding:
    for name in question.modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            found = f"{name} cannot be imported: {_line(error)}"
            fix = "install the project for the Python that jobs run (setup:, container:)"
            return Finding("failed", f"Python {place}", found, fix)
    found = f"Python {platform.python_version()} imports {listed(question.modules)}"
    return Finding("ok", f"Python {place}", found)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _names(place: str, word: str) -> Finding:
    from submitit.slurm.slurm import SlurmJobEnvironment  # takes a second, and only jobs need it

    name = SlurmJobEnvironment().hostnames[0]
    try:
        socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        found = f"{name!r} does not resolve ({error.strerror}); ranks meet on this first node"
        fix = "the site: names of nodes in its name service or /etc/hosts"
        return Finding("failed" if word == "failed" else "warning", f"names {place}", found, fix)
    return Finding("ok", f"names {place}", "the first node's name resolves; ranks meet there")


def _gpus(wanted_gb: int, what: str) -> Finding:
    import torch  # takes seconds, and stages without GPUs do not need it

    try:
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        problem = ""
    except (RuntimeError, AssertionError) as error:
        gpus, problem = [], f" ({_line(error)})"
    if not gpus:
        fix = "`nvidia-smi` there; a torch for its driver; --nv or the like for the container"
        return Finding("failed", what, f"asked for one, torch sees none{problem}", fix)
    return gpu_memory([(gpu.name, gpu.total_memory / 2**30) for gpu in gpus], wanted_gb, what)


def gpu_memory(gpus: list[tuple[str, float]], wanted_gb: int, what: str) -> Finding:
    """Whether GPUs, by name and GiB, have the memory that the profile needs."""
    found = listed(f"{name}, {memory:.0f} GiB" for name, memory in gpus)
    # A card sold as one of 80 GB shows 79.
    if min(memory for _, memory in gpus) < 0.95 * wanted_gb:
        fix = "use larger GPUs (gpu_type)"
        return Finding("failed", what, f"{found}; needs {wanted_gb} GB", fix)
    return Finding("ok", what, found)


def _weights(names: tuple[str, ...], what: str) -> Finding:
    from huggingface_hub import constants  # the hub takes seconds, and mini needs none

    from g2rpo.hub.catalogue import catalogue
    from g2rpo.hub.lock import read_lock
    from g2rpo.hub.status import artifact_state

    fix = "a shared HF_HOME (environment:), mounted in a container (container.mounts)"
    try:
        lock = read_lock()
        chosen = [artifact for artifact in catalogue().artifacts if artifact.name in names]
        words = {artifact.name: artifact_state(artifact, lock).word for artifact in chosen}
    except Exception as error:
        return Finding("failed", what, _line(error), fix)
    absent = [name for name in names if words.get(name) not in ("cached", "locked")]
    cache = constants.HF_HUB_CACHE
    if absent:
        found = f"cached where this was started, but not in {cache} there: {listed(absent)}"
        return Finding("failed", what, found, fix)
    return Finding("ok", what, f"all {len(words)} in {cache}")


def main() -> None:
    """Writes what this process finds to ``FOLDER/answer-RANK.json``."""
    folder = Path(sys.argv[1])
    question = Question.model_validate_json((folder / QUESTION).read_text())
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    found = [asdict(finding) for finding in look_around(question, folder, f"on {node}")]
    write_json(folder / f"answer-{os.environ.get('SLURM_PROCID', '0')}.json", found)


if __name__ == "__main__":
    main()
