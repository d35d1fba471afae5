"""What a trial job has found, as lines; and how memory and disk are judged anywhere."""

from collections.abc import Iterator
from typing import Any

from slurm.doctor.finding import Case, Finding, listed
from slurm.graph import Needs


def judged(case: Case, needs: Needs, answer: dict[str, Any]) -> Iterator[Finding]:
    """The lines of what one rank of the trial job found."""
    node = answer["node"]
    broken = {name: problem for name, problem in answer["modules"].items() if problem}
    if broken:
        name, problem = next(iter(broken.items()))
        mend = "install the project for the Python that jobs run (setup:, container:)"
        yield Finding("failed", f"Python on {node}", f"{name} cannot be imported: {problem}", mend)
    else:
        found = f"Python {answer['python']} imports {listed(answer['modules'])}"
        yield Finding("ok", f"Python on {node}", found)
    several = any(each.ranks > 1 for each in case.wanted.values())
    if answer["meeting"]:
        yield Finding(
            "failed" if several else "warning",
            f"names on {node}",
            f"the first node's name does not resolve ({answer['meeting']}); ranks meet there",
            "the site: names of nodes in its name service or /etc/hosts",
        )
    else:
        yield Finding("ok", f"names on {node}", "the first node's name resolves; ranks meet there")
    if needs.gpus:
        yield _gpus(case, answer)
    yield disk(case, answer["free_gb"], f"disk on {node}")
    if answer["absent"]:
        yield Finding(
            "failed",
            f"files on {node}",
            f"not there: {listed(answer['absent'])}",
            "put them on a shared file system, or mount their folder (container.mounts)",
        )
    elif case.options.files:
        yield Finding("ok", f"files on {node}", f"all {len(case.options.files)} there")
    yield from _weights(case, answer)


def _gpus(case: Case, answer: dict[str, Any]) -> Finding:
    what = f"GPUs on {answer['node']}"
    problem = answer.get("gpus_problem")
    if problem or not answer["gpus"]:
        found = "asked for one, torch sees none" + (f" ({problem})" if problem else "")
        mend = "`nvidia-smi` there; a torch for its driver; --nv or the like for the container"
        return Finding("failed", what, found, mend)
    return gpu_memory(case, answer["gpus"], what)


def gpu_memory(case: Case, gpus: list[dict[str, Any]], what: str) -> Finding:
    """Whether GPUs that torch sees have the memory that the profile needs."""
    wanted = case.options.gpu_memory_gb
    least = min(gpu["memory_gb"] for gpu in gpus)
    found = listed(f"{gpu['name']}, {gpu['memory_gb']:.0f} GiB" for gpu in gpus)
    # A card sold as one of 80 GB shows 79.
    if least < 0.95 * wanted:
        return Finding("failed", what, f"{found}; needs {wanted} GB", "use larger GPUs (gpu_type)")
    return Finding("ok", what, found)


def disk(case: Case, free_gb: float, what: str) -> Finding:
    """Whether the results folder has room."""
    if free_gb < case.options.disk_gb:
        found = f"{free_gb:.1f} GB free, {case.options.disk_gb:.0f} GB are likely to be needed"
        return Finding("warning", what, found, "free some, or --results on a larger disk")
    return Finding("ok", what, f"{free_gb:.0f} GB free")


def _weights(case: Case, answer: dict[str, Any]) -> Iterator[Finding]:
    what = f"weights on {answer['node']}"
    if not case.options.artifacts:
        return
    mend = "a shared HF_HOME (environment:), mounted in a container (container.mounts)"
    if answer.get("artifacts_problem"):
        yield Finding("failed", what, answer["artifacts_problem"], mend)
        return
    words = answer["artifacts"]
    absent = [
        name for name in case.options.artifacts if words.get(name) not in ("cached", "locked")
    ]
    if absent:
        found = f"cached here, but not in {answer['cache']} there: {listed(absent)}"
        yield Finding("failed", what, found, mend)
    else:
        yield Finding("ok", what, f"all {len(words)} in {answer['cache']}")
