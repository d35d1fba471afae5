"""Stages as a SLURM batch script, through submitit: parameters, container, requeueing.

Requeueing is the batch script's: it runs outside of any container, where ``scontrol`` is. A stage
that was asked to stop in time leaves a marker, which the lines after ``srun`` look for.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.slurm import slurm as submitit_slurm

from g2rpo.errors import UserError
from slurm.cluster import Cluster
from slurm.graph import Stage
from slurm.job import TERMINATED, requeue_marker

REPOSITORY = Path(__file__).resolve().parents[1]
JOB = "JOB"
SBATCH_SECONDS = 300
"""How long sbatch may take: a busy controller makes it wait."""
AWAY_SECONDS = 1800
"""How long a job that is to be requeued asks for a controller that is away."""
KILLED_BY_USR2 = 128 + 12
"""What srun ends with when the signal came while Python was still importing."""


@dataclass(frozen=True)
class Batch:
    """Stages that are submitted by one sbatch call.

    Attributes:
        comment: names them in SLURM.
        stages: one, or those of an array; all take the same resources.
        dependency: as sbatch's ``--dependency`` has it; None where nothing is waited for.
    """

    comment: str
    stages: tuple[Stage, ...]
    dependency: str | None = None


def parameters(cluster: Cluster, batch: Batch, jobs: Path, results: Path) -> dict[str, Any]:
    """What submitit is told about a batch, by the names of its parameters.

    Args:
        cluster: the cluster profile.
        batch: the stages.
        jobs: the submission's jobs folder.
        results: the folder that jobs write to.
    """
    stage = batch.stages[0]
    needs = stage.resources
    tasks = cluster.tasks(needs)
    settings: dict[str, Any] = {
        "job_name": f"g2rpo-{stage.kind}",
        "time": cluster.time_limit(stage.kind),
        "nodes": cluster.nodes(needs),
        "ntasks_per_node": tasks,
        "cpus_per_task": cluster.cpus_per_task,
        "partition": cluster.partition_of(needs),
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint if needs.gpus else None,
        "exclusive": (cluster.exclusive and needs.gpus > 0) or None,
        "signal_delay_s": cluster.signal_lead_seconds,
        "comment": batch.comment,
        "dependency": batch.dependency,
        "array_parallelism": cluster.array_parallelism,
        "stderr_to_stdout": True,
        "setup": setup(cluster, jobs),
        "teardown": teardown(cluster.max_restarts),
        "srun_args": srun_arguments(cluster, results),
        # A child of a failed stage is cancelled instead of pending for ever, and a site's default
        # against requeueing does not apply.
        "additional_parameters": {
            "kill-on-invalid-dep": "yes",
            "requeue": True,
            **cluster.extra,
        },
    }
    memory = cluster.memory_gb(needs)
    if memory is not None:
        settings["mem"] = f"{memory}GB"
    if needs.gpus:
        settings |= _gpus(cluster, tasks)
    if cluster.mail is not None:
        settings["mail_user"] = cluster.mail.user
        settings["mail_type"] = ",".join(cluster.mail.events)
    given = {name: value for name, value in settings.items() if value is not None}
    return given | {"wckey": None}  # submitit's own default is a key that sites may refuse


def _gpus(cluster: Cluster, per_node: int) -> dict[str, Any]:
    kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    if cluster.gpu_flag == "gres":
        return {"gres": f"gpu:{kind}{per_node}"}
    return {"gpus_per_node": f"{kind}{per_node}"}


def setup(cluster: Cluster, jobs: Path) -> list[str]:
    """Shell lines before a job's command: its id, no leftovers, the environment, the site's own."""
    exports = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(REPOSITORY),  # the code that was submitted, in a container too
        **cluster.environment,
    }
    before, after = (shlex.quote(part) for part in str(requeue_marker(jobs, JOB)).rsplit(JOB, 1))
    return [
        # One task of an array may have the number of the whole array: the plain id will not do.
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        f'marker={before}"$job"{after}',
        'rm -f "$marker"',
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        *cluster.setup,
    ]


def teardown(max_restarts: int) -> list[str]:
    """Shell lines after a job's command: requeue it where it is to go on, keep its exit code.

    It is to go on where it left a marker, where USR2 ended it before Python could handle that, and
    where preemption gave it SIGTERM alone; never once it is not RUNNING, for then it was cancelled,
    and requeueing would revive it. While the controller is away (a restart, a failover) it is
    asked again: it is the one that would end this job.
    """
    return [
        "code=$?",
        "again=",
        '[ -e "$marker" ] && again=yes',
        f'[ "$code" = {KILLED_BY_USR2} ] && again=yes',
        f"deadline=$((SECONDS + {AWAY_SECONDS}))",
        "answer() {",
        "  local pause=1 told",
        '  until told=$(timeout 60 "$@" 2>&1); do',
        # It is not there (127), or it has answered, or it has been away for long.
        '    [ "$?" = 127 ] || [[ "$told" = *"nvalid job id"* ]] && break',
        '    [ "$SECONDS" -lt "$deadline" ] || break',
        '    sleep "$pause"',
        "    pause=$((pause < 16 ? 2 * pause : 30))",
        "  done",
        '  echo "$told"',
        "}",
        f'if [ "$code" = {TERMINATED} ]; then',
        '  details=$(answer scontrol show job --oneliner "$job")',
        '  [[ "$details" = *PreemptTime=[0-9]* ]] && again=yes',
        "fi",
        'rm -f "$marker"',
        f'[ "${{SLURM_RESTART_COUNT:-0}}" -ge {max_restarts} ] && again=',
        "for _ in 1 2 3 4 5; do",
        '  [ -n "$again" ] || break',
        '  state=$(answer squeue --noheader --jobs="$job" --format=%T | tail -n 1)',
        '  [ "$state" = RUNNING ] || break',
        # SLURM ends this script soon after it has taken the request.
        '  scontrol requeue "$job" && break',
        "  sleep 10",
        "done",
        'exit "$code"',
    ]


def mounts(cluster: Cluster, results: Path) -> list[str]:
    """What a container sees of the machine, ``path:path``: the code, the results, the rest."""
    paths = [str(REPOSITORY), str(results), *cluster.container.mounts]
    return [path if ":" in path else f"{path}:{path}" for path in dict.fromkeys(paths)]


def srun_arguments(cluster: Cluster, results: Path) -> list[str]:
    """What srun is told: a rank that fails ends the others."""
    arguments = ["--kill-on-bad-exit=1"]
    if cluster.container.kind == "pyxis":
        assert cluster.container.image is not None
        arguments += [
            f"--container-image={cluster.container.image}",
            f"--container-mounts={','.join(mounts(cluster, results))}",
            f"--container-workdir={REPOSITORY}",
            "--no-container-mount-home",
            *cluster.container.arguments,
        ]
    return arguments


def python_command(cluster: Cluster, results: Path, *, gpus: bool) -> str:
    """The command that starts Python in a job, as a line of shell; ``gpus``: whether it has any."""
    container = cluster.container
    seen = mounts(cluster, results)
    if container.kind == "none":
        return shlex.quote(sys.executable)
    if container.kind == "pyxis":  # srun itself starts the container
        return shlex.quote(container.python)
    assert container.image is not None
    if container.kind == "apptainer":
        binds = [part for mount in seen for part in ("--bind", mount)]
        words = ["apptainer", "exec", *(["--nv"] if gpus else []), *binds]
        words += ["--pwd", str(REPOSITORY)]
        return shlex.join([*words, *container.arguments, container.image, container.python])
    volumes = [part for mount in seen for part in ("--volume", mount)]
    # podman passes no environment by itself; the ranks find each other by SLURM's.
    names = ("SLURM*", "SUBMITIT*", "MASTER*", "G2RPO*", *exported_names(cluster))
    environment = [part for name in names for part in ("--env", name)]
    words = ["podman", "run", "--rm", "--network=host", "--ipc=host", "--entrypoint", ""]
    # Of a container without root's rights, its root is the user who started it.
    words += ["--user", "0:0", *(["--device", "nvidia.com/gpu=all"] if gpus else [])]
    words += [*volumes, *environment, "--workdir", str(REPOSITORY), *container.arguments]
    return shlex.join([*words, container.image, container.python])


def exported_names(cluster: Cluster) -> list[str]:
    """The environment variables that the batch script sets for the job."""
    return ["PYTHONPATH", "PYTHONUNBUFFERED", *cluster.environment]


class Executor(submitit_slurm.SlurmExecutor):  # type: ignore[misc]
    """submitit's executor for SLURM, whose jobs run :mod:`slurm.job` instead of a pickle.

    submitit names a job's pickle only after sbatch has answered: a job whose submitter is killed
    in between would not find it.
    """

    @classmethod
    def name(cls) -> str:
        """The name under which submitit's job environment is found."""
        return "slurm"

    @classmethod
    def affinity(cls) -> int:
        """Whether it can be used; sbatch itself says so when something is submitted."""
        return 2

    def text(self, command: str) -> str:
        """The batch script that :meth:`submit_command` submits; it needs no SLURM."""
        text: str = self._make_submission_file_text(command, "")
        return text

    def submit_command(self, command: str) -> str:
        """Submits ``command``; returns the id of the job or array."""
        return str(self._submit_command(command).job_id)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["timeout", str(SBATCH_SECONDS), "sbatch", str(submission_file_path)]


def executor(cluster: Cluster, batch: Batch, jobs: Path, results: Path) -> Executor:
    """The executor that submits ``batch``.

    Args:
        cluster: the cluster profile.
        batch: the stages.
        jobs: the submission's jobs folder.
        results: the folder that jobs write to, seen from inside of a container too.

    Raises:
        UserError: the profile has what submitit does not take.
    """
    made = Executor(jobs)
    try:
        made.update_parameters(**parameters(cluster, batch, jobs, results))
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"cluster {cluster.name}: {' '.join(str(error).split())[:300]}") from None
    if len(batch.stages) > 1:
        made.parameters["map_count"] = len(batch.stages)  # as submitit itself makes an array
    return made


def command(cluster: Cluster, batch: Batch, jobs: Path, results: Path) -> str:
    """What each task of ``batch`` runs; the arguments are those of :func:`executor`."""
    python = python_command(cluster, results, gpus=batch.stages[0].resources.gpus > 0)
    names = [stage.name for stage in batch.stages]
    return f"{python} -u -m slurm.job {shlex.join([str(jobs.parent), *names])}"


def script(cluster: Cluster, batch: Batch, jobs: Path, results: Path) -> str:
    """The batch script of ``batch``; see :func:`executor`."""
    place = (cluster, batch, jobs, results)
    return executor(*place).text(command(*place))
