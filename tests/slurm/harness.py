"""The cluster for tests: jobs, their states and processes, and failures of nodes."""

import fcntl
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SCRIPTS = Path(__file__).parent / "cluster"
NODES = ("node1", "node2")
NOT_POSSIBLE = 3
"""The exit code of up.sh on a machine that cannot have a cluster."""

ROOT = "g2rpo-slurm-tests"
FIRST_PORT = 16917
"""Not those of ``make slurm-up``: tests cancel every job and kill nodes, and somebody may use that
cluster."""

COMMAND_SECONDS = 300
WAIT_SECONDS = 600
"""Far more than anything here takes, even on a busy machine: it only ends what would hang."""
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
}


class ClusterNotPossibleError(Exception):
    """This machine cannot run a cluster; the message says why."""


class DeadlineError(AssertionError):
    """Something did not happen in time; the message includes SLURM's state."""


class Cluster:
    """The cluster of ``tests/slurm/cluster``; every call has a time limit."""

    def __init__(self) -> None:
        temporary = os.environ.get("TMPDIR", "/tmp")
        self.root = Path(os.environ.get("G2RPO_SLURM_TESTS_ROOT", f"{temporary}/{ROOT}"))
        self.configuration = self.root / "etc" / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make SLURM's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.configuration)}

    def _script(self, name: str, *options: str) -> tuple[int, str]:
        """The exit code of one of the cluster's scripts, and what it wrote."""
        place = {"G2RPO_SLURM_ROOT": str(self.root), "G2RPO_SLURM_PORT": str(FIRST_PORT)}
        # Daemons inherit what is open, so the output goes to a file: a pipe would never end.
        with tempfile.TemporaryFile("w+") as output:
            code = subprocess.run(
                [SCRIPTS / name, *options],
                env={**os.environ, **place},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=600,
                check=False,
            ).returncode
            output.seek(0)
            return code, output.read()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other test runs away while the block runs.

        Raises:
            RuntimeError: another test run has the cluster.
        """
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{self.root}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"another test run uses the cluster in {self.root}") from None
            yield

    # -- the whole cluster -------------------------------------------------------------------

    def is_up(self) -> bool:
        """Whether the controller answers."""
        if not self.configuration.exists():
            return False
        return self._call("scontrol", "ping").returncode == 0

    def up(self) -> None:
        """Brings the cluster up, or what is missing of it.

        Raises:
            ClusterNotPossibleError: not root, or no packages.
            RuntimeError: it should have come up, and did not.
        """
        code, text = self._script("up.sh")
        if code == NOT_POSSIBLE:
            raise ClusterNotPossibleError(text.strip().splitlines()[-1])
        if code:
            raise RuntimeError(f"up.sh ended with code {code}:\n{text}")

    def down(self, *, purge: bool = False) -> None:
        """Takes the cluster down, jobs first; ``purge`` removes its folder too.

        Raises:
            RuntimeError: it could not be taken down.
        """
        code, text = self._script("down.sh", *(["--purge"] if purge else []))
        if code:
            raise RuntimeError(f"down.sh ended with code {code}:\n{text}")

    def restore(self) -> None:
        """No jobs, no processes of jobs, and both nodes idle: the state that a test begins with."""
        self._call("scancel", "--user=root")
        for node in NODES:
            self.start_slurmd(node)
        deadline = time.monotonic() + 20  # a job whose node hangs does not end by itself
        while self.run("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in self._processes():
            _kill(process)
        for node in NODES:
            # A node that was only down comes back by itself when its slurmd registers.
            if self.node_state(node).startswith("drain"):
                self._call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait(lambda: all(self.node_state(node) == "idle" for node in NODES), "two idle nodes")

    @contextmanager
    def option(self, line: str, replacement: str) -> Iterator[None]:
        """Replaces a line of slurm.conf while the block runs, and reconfigures the daemons.

        Raises:
            ValueError: there is no such line.
        """
        before = self.configuration.read_text()
        lines = before.splitlines()
        lines[lines.index(line)] = replacement
        try:
            self.configuration.write_text("\n".join(lines) + "\n")
            self.run("scontrol", "reconfigure")
            yield
        finally:
            self.configuration.write_text(before)
            self.run("scontrol", "reconfigure")

    # -- commands and waiting ----------------------------------------------------------------

    def _call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )

    def run(self, *command: str) -> str:
        """The output of a command, without the white space around it.

        Raises:
            RuntimeError: it failed; the message is what it wrote.
        """
        done = self._call(*command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}".strip())
        return done.stdout.strip()

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Waits until the condition holds.

        Raises:
            DeadlineError: it did not within :data:`WAIT_SECONDS`.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise DeadlineError(f"no {what} after {WAIT_SECONDS} s\n{self.report()}")
            time.sleep(0.2)

    def report(self) -> str:
        """What SLURM knows, for the message of a failed test."""
        commands = (
            ("sinfo", "-N", "-l"),
            ("squeue", "--all", "--states=all"),
            ("sacct", "--duplicates", "-o", "JobID,State,ExitCode,Start,End,NodeList,Reason"),
        )
        parts = [f"$ {' '.join(each)}\n{self._call(*each).stdout}" for each in commands]
        parts.extend(
            f"{log.name}:\n" + "\n".join(log.read_text().splitlines()[-15:])
            for log in sorted((self.root / "log").glob("slurm*.log"))
        )
        return "\n".join(parts)

    # -- jobs --------------------------------------------------------------------------------

    def submit(self, script: str, *options: str) -> str:
        """Submits a batch script that is given as text; returns the job's id."""
        output = f"--output={self.root}/log/job-%j.log"
        return self.run("sbatch", "--parsable", output, *options, f"--wrap={script}")

    def fields(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` tells of one job or one task of an array."""
        text = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, job: str) -> str:
        """The job's state as the controller has it now, e.g. ``PENDING``."""
        return self.fields(job)["JobState"]

    def job_states(self, job: str) -> list[str]:
        """The state of every start of a job in accounting, the oldest first."""
        shown = ("--duplicates", "--allocations", "--noheader", "--parsable2", "--format=State")
        return self.run("sacct", *shown, f"--jobs={job}").splitlines()

    def wait_states(self, job: str, states: list[str]) -> None:
        """Waits until accounting, which lags, has these states for the job's starts."""
        self.wait(lambda: self.job_states(job) == states, f"accounting of job {job} as {states}")

    def wait_running(self, job: str) -> None:
        """Waits until the job runs."""
        self.wait(lambda: self.state(job) == "RUNNING", f"running job {job}")

    def wait_ended(self, job: str) -> str:
        """Waits until the job has ended for good; returns its state as the controller has it."""
        self.wait(lambda: self.state(job) in ENDED, f"end of job {job}")
        return self.state(job)

    def requeue(self, job: str) -> None:
        """Requeues a job from outside: it gets no signal of its own."""
        self.run("scontrol", "requeue", job)

    def scancel(self, job: str, signal_name: str | None = None) -> None:
        """Cancels a job, or sends it a signal (``USR2``) and leaves it running."""
        self.run("scancel", *([f"--signal={signal_name}"] if signal_name else []), job)

    def set_time_limit(self, job: str, minutes: int) -> None:
        """Sets the time limit of a job, in whole minutes from its start."""
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def preempt(self) -> None:
        """Takes both nodes for a job of higher priority until it runs, then cancels that job."""
        job = self.submit("sleep 600", "--partition=high", "--nodes=2", "--exclusive")
        try:
            self.wait_running(job)
        finally:
            self.scancel(job)

    # -- nodes and processes -----------------------------------------------------------------

    def node_state(self, node: str) -> str:
        """The state of a node, e.g. ``idle`` or ``down*`` (the star: it does not answer)."""
        # Asked about one node alone, a restarted controller keeps reporting the old state.
        text = self.run("sinfo", "--noheader", "-N", "--partition=main", "-o", "%N %T")
        return dict(line.split() for line in text.splitlines())[node]

    def processes(self, job: str, node: str | None = None) -> list[psutil.Process]:
        """The processes that a job started and that live, on one node or on all."""
        number = self.fields(job)["JobId"]
        return [
            process
            for process in self._processes(node)
            if _variable(process, "SLURM_JOB_ID") == number
        ]

    def _processes(self, node: str | None = None) -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter()
            if _variable(process, "SLURM_CONF") == str(self.configuration)
            and _variable(process, "SLURM_JOB_ID") is not None
            and _variable(process, "SLURMD_NODENAME") is not None
            and node in {None, _variable(process, "SLURMD_NODENAME")}
        ]

    def step_daemons(self, node: str) -> list[psutil.Process]:
        """The slurmstepd of a node: known by the log of the slurmd that they came from."""
        log = str(self.root / "log" / f"slurmd-{node}.log")
        found = []
        for process in psutil.process_iter(["name"]):
            if process.info["name"] != "slurmstepd":
                continue
            try:
                if any(opened.path == log for opened in process.open_files()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def _slurmd(self, node: str) -> psutil.Process | None:
        file = self.root / "run" / f"slurmd-{node}.pid"
        try:
            process = psutil.Process(int(file.read_text()))
            command = process.cmdline()
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess, psutil.ZombieProcess):
            return None
        is_ours = str(self.configuration) in command and command[-1] == node
        return process if is_ours else None

    @contextmanager
    def controller_away(self) -> Iterator[None]:
        """Stops the controller while the block runs; jobs and their processes continue."""
        process = psutil.Process(int((self.root / "run" / "slurmctld.pid").read_text()))
        # A killed one forgets the last seconds, and starts jobs again that run.
        self.run("scontrol", "shutdown", "slurmctld")
        process.wait(timeout=COMMAND_SECONDS)
        try:
            yield
        finally:
            # It would keep a pipe open.
            subprocess.run(
                ["slurmctld", "-f", str(self.configuration)],
                env={**os.environ, **self.environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=COMMAND_SECONDS,
                check=True,
            )
            self.wait(self.is_up, "controller")

    def kill_slurmd(self, node: str) -> None:
        """Kills a node's slurmd as a crash would; steps and their processes live on."""
        process = self._slurmd(node)
        assert process is not None, f"no slurmd on {node}"
        _kill(process)

    def kill_node(self, node: str) -> None:
        """Kills a node's slurmd, its step daemons and all processes of jobs there: power is off."""
        # The daemons go first, so that nobody is left to report how the rest ended.
        slurmd = self._slurmd(node)
        for process in [*([slurmd] if slurmd else []), *self.step_daemons(node)]:
            _kill(process)
        while left := self._processes(node):
            for process in left:
                _kill(process)

    def start_slurmd(self, node: str) -> None:
        """Starts a node's slurmd where it does not run."""
        if self._slurmd(node) is None:
            self.run("slurmd", "-f", str(self.configuration), "-N", node)

    @contextmanager
    def small_disk(self, folder: Path, megabytes: int) -> Iterator[Path]:
        """Yields ``folder`` as a disk of that size; both are gone afterwards."""
        folder.mkdir(parents=True)
        options = f"size={megabytes}m,mode=700"
        self.run("mount", "-t", "tmpfs", "-o", options, "g2rpo-slurm", str(folder))
        try:
            yield folder
        finally:
            # Lazily: a process may still be at work there.
            self.run("umount", "--lazy", str(folder))
            folder.rmdir()


def _variable(process: psutil.Process, name: str) -> str | None:
    """A variable of the environment that a process was started with."""
    try:
        value: str | None = process.environ().get(name)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
        return None
    return value


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=5)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        # A dead process whose parent has not read its exit code yet counts as gone.
        return


def usr2_by_hand(cluster: Cluster, job: str) -> None:
    """Sends a job the signal that asks to be requeued."""
    cluster.scancel(job, "USR2")


def preempted(cluster: Cluster, job: str) -> None:
    """Preempts whatever runs."""
    cluster.preempt()
