"""Places where benchmarks/faults.py runs a study, and the harm that can be done to it there."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from processes import kill, launchers, processes
from slurm_cluster import Cluster

DEMIX = [sys.executable, "-m", "megatron_demix.cli"]
INCOMPLETE = 75
_DISK_MIB = 64
_FULL_S = 8


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of its own for a folder, so that it can be full; False where this user may not mount one."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "demix", folder], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)


class Place:
    """Somewhere a study runs. faults: by name, a function that does harm and says whether it found something to harm."""

    def __init__(self, study: Path, part: str, chance: random.Random, *, own_disk: bool) -> None:
        self.study, self.runs, self.part, self.chance = study, study.parent, part, chance
        self._damaged: set[int] = set()
        self.nodes_given_back = 0
        self.faults: dict[str, Callable[[], bool]] = {
            "SIGKILL of a rank": lambda: self.kill_one(self.ranks()),
            "damaged newest checkpoint": self.damage,
        }
        if own_disk:
            self.faults["full disk"] = self.fill_disk

    @property
    def run(self) -> Path:
        return self.runs / "faults"

    def start(self) -> None:
        raise NotImplementedError

    def start_twice(self) -> None:
        """Two commands at once, one of which says that the other has it."""
        raise NotImplementedError

    def state(self) -> str:
        """running, stopped or done."""
        raise NotImplementedError

    def ranks(self) -> list[int]:
        return processes("megatron_demix.pipeline.worker", f"{self.run}/")

    def kill_one(self, pids: list[int]) -> bool:
        if pids:
            kill(self.chance.choice(pids))
        return bool(pids)

    def damage(self) -> bool:
        """One bit of the newest of two checkpoints is flipped, and the ranks are killed before they save the next."""
        for work in sorted(self.run.glob("*/.*.work")):
            stage = work.name.removeprefix(".").removesuffix(".work")
            pids = processes("megatron_demix.pipeline.worker", f"{self.run}/", stage)
            if len(list(work.glob("iter_*"))) < 2 or not pids:
                continue
            newest = sorted(work.glob("iter_*"))[-1]
            if newest.stat().st_ino in self._damaged:
                continue  # nobody has come past it yet
            for pid in pids:
                kill(pid)
            newest = sorted(work.glob("iter_*"))[-1]
            self._damaged.add(newest.stat().st_ino)
            shard = self.chance.choice(sorted(newest.glob("*.distcp")))
            data = bytearray(shard.read_bytes())
            data[self.chance.randrange(len(data))] ^= 1
            shard.write_bytes(data)
            return True
        return False

    def fill_disk(self) -> bool:
        """Not a byte can be written until the study has stopped, or for some seconds."""
        if self.state() != "running":
            return False
        filler = self.runs / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        until = time.monotonic() + _FULL_S
        while time.monotonic() < until and self.state() == "running":
            time.sleep(0.2)
        filler.unlink()
        return True


class Local(Place):
    """`demix run` on this machine; whoever sees it end unfinished gives the command again."""

    def __init__(self, study: Path, part: str, chance: random.Random, *, own_disk: bool) -> None:
        super().__init__(study, part, chance, own_disk=own_disk)
        self._process: subprocess.Popen | None = None
        self.faults |= {
            "SIGKILL of demix": lambda: self._signal(signal.SIGKILL),
            "SIGTERM of demix": lambda: self._signal(signal.SIGTERM),
        }

    def start(self) -> None:
        self._process = self._start()

    def start_twice(self) -> None:
        both = [self._start(), self._start()]
        while all(process.poll() is None for process in both):
            time.sleep(0.05)
        first, second = both if both[0].poll() is not None else reversed(both)
        if first.returncode == 0:  # it has done all there is to do
            second.wait()
            first, second = second, first
        if first.returncode != INCOMPLETE and second.returncode != 0:
            raise RuntimeError(f"of two commands at once, one ended with {first.returncode}, expected {INCOMPLETE}")
        self._process = second

    def _start(self) -> subprocess.Popen:
        command = [*DEMIX, self.part, str(self.study), "--runs", str(self.runs), "--quiet"]
        # Its output is no part of the run, and elsewhere than on the disk that may be full.
        with open(self.runs.with_suffix(".log"), "a") as output:
            return subprocess.Popen(command, stdout=output, stderr=output)

    def state(self) -> str:
        assert self._process is not None
        code = self._process.poll()
        return "running" if code is None else "done" if code == 0 else "stopped"

    def _signal(self, signum: signal.Signals) -> bool:
        if self.state() != "running":
            return False
        assert self._process is not None
        self._process.send_signal(signum)
        self._process.wait()
        return True


class Slurm(Place):
    """`demix submit` on a private cluster."""

    def __init__(self, study: Path, part: str, chance: random.Random, cluster: Cluster, *, own_disk: bool) -> None:
        super().__init__(study, part, chance, own_disk=own_disk)
        self._cluster, self._looked, self._state = cluster, 0.0, "running"
        self.faults |= {
            "SIGKILL of a stage's task": lambda: self.kill_one(processes("megatron_demix.launch.stage", f"{self.run}/")),
            "SIGKILL of torchrun": lambda: self.kill_one(launchers("launch.ranks", f"{self.run}/")),
            "SIGKILL of srun": lambda: self.kill_one(launchers("srun ", f"{self.run}/")),
            "SIGKILL of a batch script": lambda: self.kill_one(processes(f"{cluster.folder}/", "slurm_script")),
            "SIGKILL of slurmctld": self._restart_controller,
            "SIGKILL of all on a node": self._crash_node,
            "USR1, as before a time limit": lambda: self._on_a_job("scancel", "--signal=USR1", "--batch"),
            "scancel": lambda: self._on_a_job("scancel"),
            "scontrol requeue": lambda: self._on_a_job("scontrol", "requeue"),
            "node set down": self._node_down,
        }

    def _submit(self) -> subprocess.Popen:
        slurm = ["--set", "launch.backend=slurm", "--set", "parallel.data=2", "--set", "train.micro_batch_size=4"]
        arguments = [*DEMIX, "submit", str(self.study), "--runs", str(self.runs), *slurm]
        return subprocess.Popen(
            arguments, env=self._cluster.environment, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
        )

    def start(self) -> None:
        process = self._submit()
        _, said = process.communicate(timeout=200)
        if process.returncode not in (0, INCOMPLETE):
            raise RuntimeError(said)
        self._state = "running"

    def start_twice(self) -> None:
        both = [self._submit(), self._submit()]
        said = [process.communicate(timeout=200)[1] for process in both]
        if sorted(process.returncode for process in both) != [0, INCOMPLETE]:
            raise RuntimeError(f"two submits at once: {said}")
        self._state = "running"

    def state(self) -> str:
        """Asked of SLURM no more than once a second; what is published is looked at first."""
        if time.monotonic() - self._looked > 1:
            self._looked = time.monotonic()
            with contextlib.suppress(RuntimeError):
                self._give_back_nodes()
                waiting = self._cluster.run("squeue", "--noheader", "--array", "--format=%r").splitlines()
                # A job that SLURM holds after it could not start it waits for a person, who gives the command again.
                self._state = "running" if waiting and not any("requeued held" in reason for reason in waiting) else "stopped"
                if not waiting and (self.run / "report" / "index.html").exists():
                    self._state = "done"
        return self._state

    def _give_back_nodes(self) -> None:
        """As an administrator would: a controller that forgot its last seconds drains nodes where it starts jobs twice."""
        for node in self._cluster.run("sinfo", "--noheader", "--Node", "--states=drain", "--format=%N").split():
            self._cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
            self.nodes_given_back += 1

    def _running(self) -> list[str]:
        return self._cluster.run("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%A", check=False).split()

    def _on_a_job(self, *command: str) -> bool:
        jobs = self._running()
        if jobs:
            self._cluster.run(*command, self.chance.choice(jobs), check=False)
        return bool(jobs)

    def _node_down(self) -> bool:
        if not self._running():
            return False
        node = f"NodeName={self.chance.choice(self._cluster.nodes)}"
        self._cluster.run("scontrol", "update", node, "State=DOWN", "Reason=fault", check=False)
        time.sleep(1)
        self._cluster.run("scontrol", "update", node, "State=RESUME", check=False)
        return True

    def _crash_node(self) -> bool:
        if not self._running():
            return False
        node = self.chance.choice(self._cluster.nodes)
        self._cluster.crash_node(node)
        time.sleep(1)
        self._cluster.start_daemon(node, rebooted=True)
        return True

    def _restart_controller(self) -> bool:
        self._cluster.kill_daemon("slurmctld")
        time.sleep(1)
        self._cluster.start_daemon("slurmctld")
        self._cluster.wait_until_answering()
        return True
