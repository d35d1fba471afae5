"""Stages as a SLURM batch script, built with submitit: resources, container, requeueing.

The batch script requeues its own job: it runs outside any container, where ``scontrol`` is
available. A stage that stopped in time leaves a marker, which the lines after ``srun`` look for.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.slurm import slurm as submitit_slurm

from g2rpo.errors import UserError, reason
from slurm.cluster import Cluster
from slurm.graph import Stage
from slurm.job import TERMINATED, requeue_marker

REPOSITORY = Path(__file__).resolve().parents[1]
JOB = "JOB"
SBATCH_SECONDS = 300
"""Time limit of sbatch: it waits for a busy controller."""
AWAY_SECONDS = 1800
"""How long a job that wants to be requeued retries while the controller is unreachable."""
KILLED_BY_USR2 = 128 + 12
"""srun's exit code if the signal arrived while Python was still importing."""


class Executor(submitit_slurm.SlurmExecutor):  # type: ignore[misc]
    """submitit's executor for SLURM, whose jobs run :mod:`slurm.job` instead of a pickle.

    submitit names a job's pickle only after sbatch has answered: if the submitting process is
    killed in between, the job does not find it.
    """

    @classmethod
    def name(cls) -> str:
        """The name under which submitit finds the job environment."""
        return "slurm"

    @classmethod
    def affinity(cls) -> int:
        """Always available: sbatch itself reports problems when something is submitted."""
        return 2

    def text(self, command: str) -> str:
        """The batch script that :meth:`submit_command` would submit; works without SLURM."""
        text: str = self._make_submission_file_text(command, "")
        return text

    def submit_command(self, command: str) -> str:
        """Submits ``command``; returns the id of the job or array."""
        return str(self._submit_command(command).job_id)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["timeout", str(SBATCH_SECONDS), "sbatch", str(submission_file_path)]


@dataclass(frozen=True)
class Batch:
    """Stages that are submitted by one sbatch call.

    Attributes:
        cluster: the cluster profile.
        jobs: the submission's jobs folder.
        results: the folder that jobs write to; mounted in containers.
        comment: identifies them in SLURM.
        stages: one, or those of an array; all use the same resources.
        dependency: sbatch's ``--dependency``; None for none.
    """

    cluster: Cluster
    jobs: Path
    results: Path
    comment: str
    stages: tuple[Stage, ...]
    dependency: str | None = None

    @property
    def command(self) -> str:
        """The shell command of each task."""
        gpus = self.stages[0].resources.gpus > 0
        python = python_command(self.cluster, self.results, gpus=gpus)
        words = [str(self.jobs.parent), *(stage.name for stage in self.stages)]
        return f"{python} -u -m slurm.job {shlex.join(words)}"

    def script(self, command: str | None = None) -> str:
        """The batch script, or one with another ``command`` on the same resources.

        Raises:
            UserError: submitit rejects the profile, or ranks do not fill its nodes.
        """
        return self._executor().text(command or self.command)

    def submit(self) -> str:
        """Submits the stages; returns the id of the job or array. Raises as :meth:`script`."""
        return self._executor().submit_command(self.command)

    def _executor(self) -> Executor:
        made = Executor(self.jobs)
        try:
            made.update_parameters(**self._parameters())
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"cluster {self.cluster.name}: {reason(error, 300)}") from None
        if len(self.stages) > 1:
            made.parameters["map_count"] = len(self.stages)  # as submitit itself makes an array
        return made

    def _parameters(self) -> dict[str, Any]:
        """The parameters of submitit's executor."""
        cluster, stage = self.cluster, self.stages[0]
        needs, memory = stage.resources, self.cluster.memory_gb(stage.resources)
        tasks, mail = cluster.tasks(needs), cluster.mail
        settings: dict[str, Any] = {
            "job_name": f"g2rpo-{stage.kind}",
            "time": cluster.time_limit(stage.kind),
            "nodes": cluster.nodes(needs),
            "ntasks_per_node": tasks,
            "cpus_per_task": cluster.cpus_per_task,
            "mem": f"{memory}GB" if memory else None,
            "partition": cluster.partition_of(needs),
            "account": cluster.account,
            "qos": cluster.qos,
            "constraint": cluster.constraint if needs.gpus else None,
            "exclusive": (cluster.exclusive and needs.gpus > 0) or None,
            "mail_user": mail and mail.user,
            "mail_type": mail and ",".join(mail.events),
            "signal_delay_s": cluster.signal_lead_seconds,
            "comment": self.comment,
            "dependency": self.dependency,
            "array_parallelism": cluster.array_parallelism,
            "stderr_to_stdout": True,
            "setup": setup(cluster, self.jobs),
            "teardown": teardown(cluster.max_restarts),
            "srun_args": srun_arguments(cluster, self.results),
            # Cancels the children of a failed stage, which would stay pending forever, and
            # overrides a site's default against requeueing.
            "additional_parameters": {
                "kill-on-invalid-dep": "yes",
                "requeue": True,
                **cluster.extra,
            },
        }
        if needs.gpus:
            kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
            prefix = "gpu:" if cluster.gpu_flag == "gres" else ""
            settings[cluster.gpu_flag] = f"{prefix}{kind}{tasks}"
        given = {name: value for name, value in settings.items() if value is not None}
        return given | {"wckey": None}  # submitit sets a default wckey, which sites may reject


def setup(cluster: Cluster, jobs: Path) -> list[str]:
    """Shell lines before a job's command: job id, old marker, environment, the site's own."""
    exports = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(REPOSITORY),  # the code that was submitted, also in a container
        **cluster.environment,
    }
    before, after = (shlex.quote(part) for part in str(requeue_marker(jobs, JOB)).rsplit(JOB, 1))
    return [
        # One task's plain id is the id of the whole array, so array tasks use ARRAY_INDEX.
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        f'marker={before}"$job"{after}',
        'rm -f "$marker"',
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        *cluster.setup,
    ]


def teardown(max_restarts: int) -> list[str]:
    """Shell lines after a job's command: requeue the job if it can resume, keep its exit code.

    A job resumes if it left a marker, if USR2 ended it before Python could handle the signal, or if
    it was preempted by SIGTERM alone; never if it is no longer RUNNING, since requeueing would
    revive a cancelled job. An unreachable controller (restart, failover) is asked again.
    """
    return [
        "code=$?",
        "again=",
        '[ -e "$marker" ] && again=yes',
        f'[ "$code" = {KILLED_BY_USR2} ] && again=yes',
        f"deadline=$((SECONDS + {AWAY_SECONDS}))",
        "answer() {",
        "  local pause=1 reply",
        '  until reply=$(timeout 60 "$@" 2>&1); do',
        # No such command (127), a final answer, or unreachable for too long.
        '    [ "$?" = 127 ] || [[ "$reply" = *"nvalid job id"* ]] && break',
        '    [ "$SECONDS" -lt "$deadline" ] || break',
        '    sleep "$pause"',
        "    pause=$((pause < 16 ? 2 * pause : 30))",
        "  done",
        '  echo "$reply"',
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
        # SLURM ends this script soon after accepting the request.
        '  scontrol requeue "$job" && break',
        "  sleep 10",
        "done",
        'exit "$code"',
    ]


def mounts(cluster: Cluster, results: Path) -> list[str]:
    """The mounts of a container, ``path:path``: code, results, and the profile's own."""
    paths = [str(REPOSITORY), str(results), *cluster.container.mounts]
    return [path if ":" in path else f"{path}:{path}" for path in dict.fromkeys(paths)]


def srun_arguments(cluster: Cluster, results: Path) -> list[str]:
    """Arguments of srun: a failed rank ends the others."""
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
    """The shell command that starts Python in a job; ``gpus``: whether the job has GPUs."""
    container = cluster.container
    seen = mounts(cluster, results)
    if container.kind == "none":
        return shlex.quote(sys.executable)
    if container.kind == "pyxis":  # srun starts the container
        return shlex.quote(container.python)
    assert container.image is not None
    if container.kind == "apptainer":
        binds = [part for mount in seen for part in ("--bind", mount)]
        words = ["apptainer", "exec", *(["--nv"] if gpus else []), *binds]
        words += ["--pwd", str(REPOSITORY)]
        return shlex.join([*words, *container.arguments, container.image, container.python])
    volumes = [part for mount in seen for part in ("--volume", mount)]
    # podman passes no environment on by default; ranks find each other through SLURM's.
    names = ("SLURM*", "SUBMITIT*", "MASTER*", "G2RPO*", "PYTHONPATH", "PYTHONUNBUFFERED",
             *cluster.environment)  # fmt: skip
    environment = [part for name in names for part in ("--env", name)]
    words = ["podman", "run", "--rm", "--network=host", "--ipc=host", "--entrypoint", ""]
    # In a rootless container, root is the user who started it.
    words += ["--user", "0:0", *(["--device", "nvidia.com/gpu=all"] if gpus else [])]
    words += [*volumes, *environment, "--workdir", str(REPOSITORY), *container.arguments]
    return shlex.join([*words, container.image, container.python])
