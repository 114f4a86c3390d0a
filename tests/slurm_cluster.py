"""A private SLURM cluster on this machine: one slurmctld and several slurmd on loopback, with an authentication of its own.

As a script it starts one and waits until it is interrupted: `python tests/slurm_cluster.py FOLDER` prints what to export.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import kill_all_of_node

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
START_LIMIT_S = 30


def missing_programs() -> list[str]:
    """Those of SLURM's programs that this machine has not; apt-get install slurm-wlm brings all of them."""
    return [p for p in PROGRAMS if shutil.which(p) is None]


class Cluster:
    """A running cluster. Every command of SLURM's finds it through `environment`."""

    def __init__(self, folder: Path, num_nodes: int, cpus: int, more: str = "") -> None:
        self.folder, self.nodes = folder, [f"n{i + 1}" for i in range(num_nodes)]
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}
        for name in ("state", "spool", "log"):
            (folder / name).mkdir(parents=True)
        ports = _free_ports(num_nodes + 1)
        (folder / "slurm.conf").write_text(_configuration(folder, self.nodes, cpus, ports) + more)
        (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # there is nothing behind the name
        (folder / "log" / "jobs.txt").touch()

    def start_daemon(self, name: str, *, rebooted: bool = False) -> None:
        """name: "slurmctld" or a node's. rebooted: as which a node shall report, so that SLURM gives up what ran there."""
        command = ["slurmctld", "-D"] if name == "slurmctld" else ["slurmd", "-D", "-N", name, *(["-b"] if rebooted else [])]
        with open(self.folder / "log" / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def kill_daemon(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def crash_node(self, name: str) -> None:
        """SIGKILL for its slurmd, for its jobs and for all that watches them, as if it had lost its power."""
        kill_all_of_node(name, self.folder / "log" / f"slurmd.{name}.log")
        self._daemons.pop(name).wait()

    def run(self, *command: str, check: bool = True) -> str:
        """Output of one of SLURM's commands."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {result.returncode}: {result.stderr}")
        return result.stdout

    def jobs(self) -> list[str]:
        """Ids of the jobs that have not ended, an array's elements one by one."""
        return self.run("squeue", "--noheader", "--array", "--format=%i").split()

    def wait_until_answering(self) -> None:
        """For a controller that was started again."""
        deadline = time.monotonic() + START_LIMIT_S
        while "UP" not in self.run("scontrol", "ping", check=False):
            if time.monotonic() >= deadline:
                raise RuntimeError(f"slurmctld does not answer {START_LIMIT_S} s after its start")
            time.sleep(0.1)

    def wait_until_saved(self) -> None:
        """slurmctld writes its jobs down every few seconds. One that is killed has forgotten what came later: it may lose jobs,
        start them twice, and drain their node."""
        asked = time.time()
        self.run("scontrol", "update", f"JobId={self.jobs()[0]}", "Comment=saved")
        deadline = time.monotonic() + START_LIMIT_S
        while (self.folder / "state" / "job_state").stat().st_mtime < asked:
            if time.monotonic() >= deadline:
                raise RuntimeError(f"slurmctld has not saved its state for {START_LIMIT_S} s")
            time.sleep(0.1)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            idle = self.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N", check=False).split()
            if set(idle) == set(self.nodes):
                return
            time.sleep(0.1)
        logs = "\n".join(p.read_text()[-2000:] for p in sorted((self.folder / "log").glob("*")))
        raise RuntimeError(f"the private SLURM is not ready after {START_LIMIT_S} s; its logs end:\n{logs}")

    def stop(self) -> None:
        if "slurmctld" in self._daemons:
            for job in self.run("squeue", "--noheader", "--format=%A", check=False).split():
                self.run("scancel", "--signal=KILL", "--full", job, check=False)
                self.run("scancel", job, check=False)
            deadline = time.monotonic() + 10
            while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in self._daemons.values():
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextmanager
def private_cluster(folder: Path, *, num_nodes: int = 2, cpus: int = 2, more: str = "") -> Iterator[Cluster]:
    """more: lines of slurm.conf."""
    cluster = Cluster(folder, num_nodes, cpus, more)
    try:
        for name in ("slurmctld", *cluster.nodes):
            cluster.start_daemon(name)
        cluster.wait_until_ready()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _configuration(folder: Path, nodes: list[str], cpus: int, ports: list[int]) -> str:
    """No munge, no accounting database, no cgroups: nothing that needs another service or more rights than this user has."""
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    lines = {
        "ClusterName": "private",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": ports[0],
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/none",
        "CredType": "cred/none",
        # A requeued job waits until its old credential has expired; 5 s is the least there is.
        "AuthInfo": "cred_expire=5",
        "MpiDefault": "none",
        "MailProg": "/bin/true",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "JobCompType": "jobcomp/filetxt",
        "JobCompLoc": folder / "log" / "jobs.txt",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerParameters": "sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1",
        "SlurmdParameters": "config_overrides",
        "GresTypes": "gpu",
        "ReturnToService": 2,
        "MinJobAge": 300,
        "KillWait": 5,
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool" / "%n",
        "SlurmctldPidFile": folder / "state" / "slurmctld.pid",
        "SlurmdPidFile": folder / "state" / "slurmd.%n.pid",
        "SlurmctldLogFile": folder / "log" / "slurmctld.log",
        "SlurmdLogFile": folder / "log" / "slurmd.%n.log",
    }
    text = [f"{key}={value}" for key, value in lines.items()]
    for node, port in zip(nodes, ports[1:], strict=True):
        (folder / "spool" / node).mkdir()
        text.append(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000 Gres=gpu:1"
        )
    text.append("PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with private_cluster(Path(sys.argv[1]).resolve()) as running:
        print(f"export SLURM_CONF={running.environment['SLURM_CONF']}", flush=True)
        signal.pause()
