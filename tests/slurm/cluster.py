"""A real Slurm of three nodes on this machine: its daemons, files and ports are its own.

Nodes share a host name, an address and a file system; CPUs, memory and GPUs are counted, and not enforced. Jobs run
without cgroups: what a job leaves behind is still there for a test to see.
"""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.conftest import free_port

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "slurm" / "jest.sbatch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "tini")
_PATH = f"{os.environ['PATH']}:/usr/sbin"
# Slurm waits cred_expire seconds, by default 120, before a requeued job runs again. KillWait comes between SIGTERM and
# SIGKILL, by default 30. A job that is preempted gets its --signal at once, and has GraceTime seconds to end
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n.log
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=2
ReturnToService=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=4 RealMemory=1000000 Gres=gpu:1
NodeName=node1 Port={ports[0]} NodeAddr=127.0.0.1 NodeHostname={host}
NodeName=node2 Port={ports[1]} NodeAddr=127.0.0.1 NodeHostname={host}
NodeName=node3 Port={ports[2]} NodeAddr=127.0.0.1 NodeHostname={host}
PartitionName=DEFAULT Nodes=node[1-3] MaxTime=INFINITE DefaultTime=60
PartitionName=work Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent PriorityTier=2 PreemptMode=OFF
"""
# tini becomes the parent of every process that loses its own, so that all are found below it
_DAEMONS = """
munged --foreground --force --socket={folder}/munge/socket --key-file={folder}/munge/key \
    --seed-file={folder}/munge/seed --pid-file={folder}/munge/pid --log-file={folder}/munge/log &
until [ -S {folder}/munge/socket ]; do sleep 0.1; done
slurmctld -D &
for node in node1 node2 node3; do slurmd -D -N $node & done
exec sleep infinity
"""


class Slurm:
    """`folder` has at most 75 characters, for sockets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("munge", "state", "node1", "node2", "node3"):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o700)
        (folder / "munge" / "key").write_bytes(os.urandom(128))
        (folder / "munge" / "key").chmod(0o600)
        (folder / "nvidia0").symlink_to("/dev/null")  # a GPU has to be a device file
        (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName=node[1-3] Name=gpu File={folder}/nvidia0\n")
        host, user = os.uname().nodename.split(".")[0], psutil.Process().username()
        ports = [free_port() for _ in range(4)]
        conf = _CONF.format(folder=folder, host=host, user=user, port=ports[0], ports=ports[1:])
        (folder / "slurm.conf").write_text(conf)
        # without the variables of another Slurm job, in which these tests may run themselves
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment = outside | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": _PATH}

    def start(self) -> None:
        with (self.folder / "daemons.log").open("w") as log:
            self._tini = psutil.Popen(
                ["tini", "-s", "--", "sh", "-c", _DAEMONS.format(folder=self.folder)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while self.call("sinfo", "-h", "-N", "-p", "work", "-o", "%T", check=False).split() != ["idle"] * 3:
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)
        self._daemons = set(self._tini.children(recursive=True))

    def stop(self) -> None:
        """SIGKILL to everything."""
        while below := self._tini.children(recursive=True):
            for process in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(below, timeout=0.2)
            if not self._tini.is_running() or self._tini.status() == psutil.STATUS_ZOMBIE:
                break
        self._tini.kill()
        self._tini.wait()

    def call(self, *words: str, check: bool = True) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    def processes(self, name: str = " ") -> list[psutil.Process]:
        """Of jobs, also what they have left behind: those that run and whose command line contains `name`."""
        below = set(self._tini.children(recursive=True)) - self._daemons
        return [process for process in below if name in _command(process)]


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE:
            return f" {' '.join(process.cmdline())}"
    return ""


_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


class Job:
    """A job of the script, submitted from a folder of its own. options: of sbatch; words: of the script."""

    def __init__(self, slurm: Slurm, folder: Path, options: list[str], words: list[str], **environment: str) -> None:
        self.slurm, self.log = slurm, folder / "job.log"
        folder.mkdir()
        submitted = subprocess.run(
            ["sbatch", "--parsable", f"--output={self.log}", "--gpus-per-node=1", *options, SCRIPT, *words],
            env=slurm.environment | environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert submitted.returncode == 0, submitted.stderr
        self.id = submitted.stdout.strip()

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def shown(self, name: str) -> str:
        """A value of `scontrol show job`, such as JobState."""
        return re.search(rf"\b{name}=(\S*)", self.slurm.call("scontrol", "show", "job", self.id))[1]

    def wait_until(self, happened: Callable[[], bool], seconds: float = 600) -> None:
        """Fails if the job ends before that, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while not happened():
            ended = self.shown("JobState") in _ENDED and not happened()
            assert not ended, self.output
            assert time.monotonic() < deadline, f"{self.output}\n{self.slurm.call('squeue')}"
            time.sleep(0.2)

    def end(self, seconds: float = 600) -> tuple[str, str]:
        """Wait for its end; its state and exit status."""
        self.wait_until(lambda: self.shown("JobState") in _ENDED, seconds)
        return self.shown("JobState"), self.shown("ExitCode")
