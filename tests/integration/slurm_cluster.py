"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd in a directory of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.integration.launching import ROOT, environment, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
PATH = f"{os.environ['PATH']}:/usr/sbin"

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
SlurmUser=root
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmdSpoolDir={directory}/spool-%n
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
KillWait=5
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000 Gres=gpu:1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000 Gres=gpu:1
PartitionName=main Nodes=node1,node2 Default=YES State=UP
"""


def why_not() -> str | None:
    """What keeps a cluster from being started here."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "slurmd starts jobs as root only"


class Cluster:
    """Its commands, and what they need in their environment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = environment(SLURM_CONF=str(directory / "slurm.conf"))
        self.environment["PATH"] += ":/usr/sbin"

    def run(self, *command: str | Path, **settings: str) -> str:
        """Output of a command, without white space around it; ``settings`` are added to its environment."""
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **settings},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return next(field.removeprefix("JobState=") for field in fields if field.startswith("JobState="))


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    # Not below pytest's directories: the path of a socket may have 108 characters.
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(directory)
    try:
        _configure(directory)
        munge = (
            "key-file=munge.key",
            "socket=munge.socket",
            "pid-file=munge.pid",
            "log-file=munge.log",
            "seed-file=seed",
        )
        options = [f"--{name}={directory / file}" for name, file in (option.split("=") for option in munge)]
        cluster.run("munged", "--force", *options)
        cluster.run("slurmctld", "-c")
        for node in ("node1", "node2"):
            cluster.run("slurmd", "-N", node)
        wait_for("idle nodes", lambda: cluster.run("sinfo", "--noheader", "--format=%t %D") == "idle 2")
        yield cluster
    finally:
        daemons = [int(text) for file in directory.glob("*.pid") if (text := file.read_text().strip())]
        for daemon in daemons:
            with suppress(ProcessLookupError):
                os.kill(daemon, signal.SIGTERM)
        # They write once more when they leave.
        wait_for("the daemons' end", lambda: not any(Path(f"/proc/{daemon}").exists() for daemon in daemons), 30)
        shutil.rmtree(directory, ignore_errors=True)


def _configure(directory: Path) -> None:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    host = socket.gethostname().split(".")[0]
    (directory / "slurm.conf").write_text(CONFIGURATION.format(host=host, directory=directory, ports=ports))
    (directory / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # a device that every machine has
    (directory / "munge.key").write_bytes(os.urandom(128))
    (directory / "munge.key").chmod(0o400)
    (directory / "state").mkdir()
