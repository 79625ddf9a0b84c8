"""A SLURM controller with two nodes on this machine, under one folder. Not here: what runs on it.

Needs slurm-wlm and munge, no root, no systemd, no cgroups.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.toy_ranks import free_port

NODES = ("n1", "n2")
PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
# A job that is put back waits until its old credentials have expired.
CREDENTIAL_SECONDS = 5
CONFIG = """\
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.socket,cred_expire={expire}
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=5
ReturnToService=2
JobRequeue=1
KillWait=10
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def until(true: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until something holds; raises TimeoutError that says what never did."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds:.0f} s: {what}")
        time.sleep(0.3)


class Cluster:
    """A running controller; jobs are submitted with `submit` and asked about with `state`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.env = {**kept, "PATH": PLACES, "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *words: object, **env: str) -> str:
        """Run a command with the cluster's environment; returns what it printed."""
        done = subprocess.run(
            [str(word) for word in words], env={**self.env, **env}, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{words}: code {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, root: Path, *words: object, env: Mapping[str, str]) -> int:
        """Call slurm/submit.sh of a checkout; returns the job's number."""
        said = self.call("bash", root / "slurm" / "submit.sh", *words, **env)
        return int(said.split()[-1])

    def field(self, job: object, name: str) -> str:
        """One field of `scontrol show job`; empty where the job is forgotten."""
        with contextlib.suppress(RuntimeError):
            for word in self.call("scontrol", "show", "job", job).split():
                if word.startswith(f"{name}="):
                    return word.split("=", 1)[1]
        return ""

    def states(self, job: object) -> set[str]:
        """The states of a job's elements."""
        words = self.call("scontrol", "show", "job", job).split()
        return {word.split("=")[1] for word in words if word.startswith("JobState=")}

    def wait(self, job: object, seconds: float, state: str = "COMPLETED") -> None:
        """Wait until a job and all its elements have ended, and in one state."""
        alive = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"}
        until(lambda: not self.states(job) & alive, seconds, f"job {job} is {self.states(job)}")
        if self.states(job) != {state}:
            raise RuntimeError(f"job {job} ended {self.states(job)}, not {state}")


def _munge(folder: Path) -> None:
    place = folder / "munge"
    place.mkdir(mode=0o755)
    (place / "key").touch(mode=0o600)
    (place / "key").write_bytes(secrets.token_bytes(128))
    files = {"key-file": "key", "socket": "munge.socket", "seed-file": "seed",
             "pid-file": "munged.pid", "log-file": "munged.log"}  # fmt: skip
    words = [f"--{flag}={place / name}" for flag, name in files.items()]
    subprocess.run([str(shutil.which("munged", path=PLACES)), *words], check=True)


def _end(file: Path) -> None:
    """End the process that wrote a pid file."""
    with contextlib.suppress(OSError, ValueError):
        number = int(file.read_text())
        os.kill(number, signal.SIGTERM)
        end = time.monotonic() + 15
        while time.monotonic() < end:
            os.kill(number, 0)
            time.sleep(0.1)
        os.kill(number, signal.SIGKILL)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a controller and two nodes; everything is ended, and gone, when the context closes."""
    folder = Path(tempfile.mkdtemp(prefix="toy-slurm-"))
    folder.chmod(0o755)  # munge wants its socket within everybody's reach
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir(parents=True)
    ports = [free_port() for _ in range(3)]
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=host, user=user, folder=folder, ports=ports, expire=CREDENTIAL_SECONDS)
    )
    made = Cluster(folder)
    try:
        _munge(folder)
        made.call("slurmctld", "-c")
        for node in NODES:
            made.call("slurmd", "-N", node)
        until(lambda: made.call("sinfo", "-h", "-o", "%T").split() == ["idle"], 60,
              f"nodes are not idle; logs are in {folder}")  # fmt: skip
        yield made
    finally:
        with contextlib.suppress(RuntimeError, OSError, TimeoutError):
            made.call("scancel", "--user", user)
            until(lambda: not made.call("squeue", "-h"), 40, "jobs do not end")
        for name in ("slurmd.n1.pid", "slurmd.n2.pid", "slurmctld.pid", "munge/munged.pid"):
            _end(folder / name)
        shutil.rmtree(folder, ignore_errors=True)
