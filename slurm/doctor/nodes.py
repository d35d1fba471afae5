"""Partitions and nodes: whether they are there, in use, and large enough for every stage."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from g2rpo.config import nearest
from g2rpo.errors import UserError
from slurm.doctor.finding import Case, Finding, counted, listed
from slurm.doctor.site import Node, Site, number_of
from slurm.graph import Needs


def usable(case: Case, nodes: list[Node]) -> list[Node]:
    """Those nodes on which jobs can start; with a reservation, nodes set aside may be its own."""
    return [node for node in nodes if node.usable(reserved="reservation" in case.cluster.extra)]


def partitions(case: Case, site: Site) -> Iterator[Finding]:
    """Each partition that the profile names, and its nodes."""
    if None in case.partitions and site.default is None:
        yield Finding(
            "failed",
            "partition",
            "the profile names none and the cluster has no default",
            f"set partition: to one of {listed(sorted(site.partitions), 8)}",
        )
    for name in case.partitions:
        own = name is not None and name == case.cluster.cpu_partition
        key = "cpu_partition" if own else "partition"
        for part in (name or site.default or "").split(","):
            if part in site.partitions:
                yield _partition(site.partitions[part], f"{key} {part}")
                yield _nodes(case, site.nodes_of(part), f"nodes of {part}")
            elif part:
                hint = nearest(part, site.partitions)
                found = "there is no such partition"
                yield Finding("failed", f"{key} {part}", found, f"set {key}: {hint}")


def _partition(values: Mapping[str, str], what: str) -> Finding:
    state = values.get("State", "UP")
    if state != "UP":
        return Finding("failed", what, f"it is {state.lower()}", "wait, or name another partition")
    most, usual = values.get("MaxTime", "UNLIMITED"), values.get("DefaultTime", "NONE")
    text = "up, no time limit" if most == "UNLIMITED" else f"up, time limit {most}"
    if usual not in ("NONE", most):
        text += f" ({usual} for jobs that ask for none; these ask)"
    return Finding("ok", what, text)


def _nodes(case: Case, nodes: list[Node], what: str) -> Finding:
    if not nodes:
        return Finding("failed", what, "it has none", "name another partition")
    good = usable(case, nodes)
    if len(good) == len(nodes):
        return Finding("ok", what, f"{counted(len(nodes), 'node')}, all usable")
    bad = [node for node in nodes if node not in good]
    return Finding(
        "warning" if good else "failed",
        what,
        f"{len(good)} of {len(nodes)} usable; not {listed(_trouble(node) for node in bad)}",
        f"an administrator: `scontrol update NodeName={bad[0].name} State=RESUME`",
    )


def _trouble(node: Node) -> str:
    reason = f": {node.reason}" if node.reason not in ("", "none", "(null)") else ""
    return f"{node.name} ({node.state.lower()}{reason})"


@dataclass(frozen=True)
class Request:
    """What a kind of stage asks of each of its nodes.

    Attributes:
        nodes: how many nodes.
        gpus: GPUs of a node.
        gpu_type: their type; empty for any.
        cpus: CPUs of a node.
        memory_gb: main memory of a node; None where the site's default applies.
    """

    nodes: int
    gpus: int
    gpu_type: str
    cpus: int
    memory_gb: int | None

    @classmethod
    def of(cls, case: Case, needs: Needs) -> "Request":
        """The request, as batch scripts have it.

        Raises:
            UserError: its ranks cannot be shared equally among nodes.
        """
        cluster = case.cluster
        tasks = cluster.tasks(needs)
        memory = needs.memory_gb or (cluster.memory_gb_per_task or 0) * tasks
        gpus, kind = (tasks, cluster.gpu_type or "") if needs.gpus else (0, "")
        return cls(cluster.nodes(needs), gpus, kind, tasks * cluster.cpus_per_task, memory or None)

    def __str__(self) -> str:
        parts = [counted(self.cpus, "CPU")]
        if self.gpus:
            parts.insert(0, counted(self.gpus, f"{self.gpu_type} GPU".strip()))
        if self.memory_gb is not None:
            parts.append(f"{self.memory_gb} GB")
        return f"{counted(self.nodes, 'node')} with {', '.join(parts)}"

    def lacks(self, node: Node) -> set[str]:
        """What the node has too little of."""
        gpus = node.gpus.get(self.gpu_type, 0) if self.gpu_type else sum(node.gpus.values())
        short = {"GPUs": gpus < self.gpus, "CPUs": node.cpus < self.cpus}
        short["memory"] = node.memory_mb < (self.memory_gb or 0) * 1024
        return {name for name, lacking in short.items() if lacking}


def layout(case: Case, site: Site) -> Iterator[Finding]:
    """Whether nodes can hold what each kind of stage asks of them, and enough such nodes exist."""
    for needs, kinds in case.groups.items():
        what = f"devices of {listed(kinds, 8)}"
        nodes = site.nodes_of(case.partition(needs))
        try:
            request = Request.of(case, needs)
        except UserError as error:
            yield Finding("failed", what, *_halves(str(error)))
            continue
        if not nodes:
            continue  # told by the partition's own line
        if needs.gpus and case.cluster.constraint:
            # Where none meets it, the constraint's own line tells.
            asked = case.cluster.constraint
            nodes = [node for node in nodes if _meets(asked, node)] or nodes
        yield _fit(case, request, nodes, what)
        yield from _limits(case, site, needs, request)


def _halves(message: str) -> tuple[str, str]:
    found, _, mend = message.partition(": ")[2].partition("; ")
    return found, mend


def _fit(case: Case, request: Request, nodes: list[Node], what: str) -> Finding:
    fitting = [node for node in nodes if not request.lacks(node)]
    if len(fitting) < request.nodes:
        if fitting:
            found = f"{counted(len(fitting), 'such node')} in all"
            mend = "use more GPUs of each node, fewer ranks, or another partition"
        else:
            best = min(nodes, key=lambda node: (len(request.lacks(node)), -sum(node.gpus.values())))
            found, mend = f"the nodes have {_has(best)}", _mends(case, request, best)
        return Finding("failed", what, f"asks for {request}; {found}", mend)
    good = usable(case, fitting)
    if len(good) < request.nodes:
        found = f"asks for {request}; {len(good)} of {len(fitting)} such are usable now"
        return Finding("failed", what, found, "its jobs wait until the nodes are back")
    return Finding("ok", what, f"{request}; {counted(len(good), 'such node')} usable")


def _has(node: Node) -> str:
    gpus = [counted(count, f"{kind} GPU".strip()) for kind, count in node.gpus.items()]
    memory = f"{node.memory_mb / 1024:.0f} GB"
    return ", ".join([*(gpus or ["no GPU"]), counted(node.cpus, "CPU"), memory])


def _mends(case: Case, request: Request, node: Node) -> str:
    lacks = request.lacks(node)
    tasks = request.cpus // case.cluster.cpus_per_task
    mends = []
    if "GPUs" in lacks:
        kinds = sorted(kind for kind in node.gpus if kind)
        if not node.gpus:
            mends.append("name a partition with GPUs")
        elif request.gpu_type and request.gpu_type not in node.gpus:
            mends.append(f"set gpu_type: {listed(kinds) or 'null'}")
        else:
            mends.append(f"set gpus_per_node: {max(node.gpus.values())} or less")
    if "CPUs" in lacks and node.cpus >= tasks:
        mends.append(f"set cpus_per_task: {node.cpus // tasks} or less")
    elif "CPUs" in lacks:
        key = "gpus_per_node" if request.gpus else "tasks_per_node"
        mends.append(f"set {key}: {node.cpus} or less")
    if "memory" in lacks:
        mends.append(f"set memory_gb_per_task: {node.memory_mb // 1024 // tasks} or less")
    return ", ".join(mends)


def _limits(case: Case, site: Site, needs: Needs, request: Request) -> Iterator[Finding]:
    """What the partition allows of what its nodes have."""
    for name in site.names(case.partition(needs)):
        values = site.partitions[name]
        for key, asked in (("MaxNodes", request.nodes), ("MaxCPUsPerNode", request.cpus)):
            most = number_of(values.get(key))
            if most is not None and asked > most:
                found = f"{name} allows {most}, {listed(case.groups[needs], 8)} asks for {asked}"
                yield Finding("failed", f"{key} of {name}", found, "name another partition")
        default_mb = number_of(values.get("DefMemPerNode")) or number_of(
            values.get("DefMemPerCPU") or site.config.get("DefMemPerCPU")
        )
        consumed = "MEMORY" in site.config.get("SelectTypeParameters", "").upper()
        default_mb = default_mb or number_of(site.config.get("DefMemPerNode"))
        if request.memory_gb is None and consumed and default_mb is None and request.gpus:
            yield Finding(
                "warning",
                f"memory of {listed(case.groups[needs], 8)}",
                "a job that asks for none takes all of a node's, so no other runs beside it",
                "set memory_gb_per_task",
            )


def _meets(constraint: str, node: Node) -> bool:
    names = _features(constraint)
    if "|" in constraint:
        return bool(names & node.features)
    return names <= node.features


def _features(constraint: str) -> set[str]:
    return set(re.findall(r"[^\s&|,()\[\]*]+", re.sub(r"\*\d+", "", constraint)))


def constraint(case: Case, site: Site) -> Iterator[Finding]:
    """Whether nodes have the features that the profile asks for."""
    asked = case.cluster.constraint
    if not asked or not any(needs.gpus for needs in case.wanted.values()):
        return
    nodes = site.nodes_of(case.cluster.partition)
    if not nodes:
        return  # told by the partition's own line
    known = {feature for node in nodes for feature in node.features}
    unknown = sorted(_features(asked) - known)
    what = f"constraint {asked}"
    if unknown:
        found = f"no node of the partition has {listed(unknown)}"
        mend = f"set constraint: to one of {listed(sorted(known), 8)}" if known else "leave it out"
        yield Finding("failed", what, found, mend)
        return
    meeting = sum(_meets(asked, node) for node in nodes)
    if meeting:
        yield Finding("ok", what, f"{counted(meeting, 'node')} of {len(nodes)}")
    else:
        yield Finding("failed", what, "no node has all of it", "ask for less")
