#!/usr/bin/env python3
"""Random faults over a small study, again and again: is every study finished, with the artifacts of an undisturbed run?

python benchmarks/faults.py --backend local --studies 5 --faults 8      # faults of each study, on this machine
python benchmarks/faults.py --backend slurm --studies 2 --faults 8      # on a private SLURM of two nodes (needs slurm-wlm)

Prints a table and writes JSON: the faults injected by kind; studies finished; artifacts whose bytes differ from the undisturbed
run's; optimiser steps done more than once; how often the command had to be given again by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from megatron_demix.artifact import MANIFEST, Manifest, hash_file

DEMIX = [sys.executable, "-m", "megatron_demix.cli"]
LIMIT_S = 1800
STUDY = """
name: faults
seed: 11
tokenizer: {type: byte}
prepare: {workers: 1, split: [0.8, 0.1, 0.1]}
domains:
  - {name: code, inputs: ["code.jsonl"], max_epochs: 50}
  - {name: words, inputs: ["words.jsonl"], max_epochs: 50}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
train:
  {seq_length: 32, micro_batch_size: 8, global_batch_size: 8, lr: 3e-3, precision: fp32, save_interval: 20, log_interval: 1}
base: {tokens: 25600}                     # 100 steps
component: {tokens: 51200}                # 200 steps
search: {rounds: [8], objective: {code: 0.7, words: 0.3}, candidates: 1000, top: 16}
evaluate: {tokens_per_domain: 1k}
final: {tokens: 25600, baselines: []}
launch: {jobs: 2, slurm: {ranks_per_node: 1, cpus_per_task: 1, time: 20min, grace: 60, setup: "export GLOO_SOCKET_IFNAME=lo"}}
"""


class Place:
    """Somewhere a study runs. faults: by name, a function that does harm and says whether it found something to harm."""

    def __init__(self, study: Path, part: str, chance: random.Random) -> None:
        self.study, self.runs, self.part, self.chance = study, study.parent, part, chance
        self.faults: dict[str, Callable[[], bool]] = {"SIGKILL of a rank": self.kill_rank, "damaged checkpoint": self.damage}

    @property
    def run(self) -> Path:
        return self.runs / "faults"

    def ranks(self) -> list[int]:
        return processes("megatron_demix.pipeline.worker", f"{self.run}/")

    def kill_rank(self) -> bool:
        return self.kill(self.ranks())

    def kill(self, pids: list[int]) -> bool:
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.chance.choice(pids), signal.SIGKILL)
        return True

    def damage(self) -> bool:
        """One bit of the newest of two checkpoints is flipped, and the rank is killed before it saves the next."""
        for work in sorted(self.run.glob("*/.*.work")):
            saved = sorted(work.glob("iter_*"))
            pids = processes(
                "megatron_demix.pipeline.worker", f"{self.run}/", work.name.removeprefix(".").removesuffix(".work")
            )
            if len(saved) < 2 or not pids:
                continue
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            newest = sorted(work.glob("iter_*"))[-1]
            shard = self.chance.choice(sorted(newest.glob("*.distcp")))
            data = bytearray(shard.read_bytes())
            data[self.chance.randrange(len(data))] ^= 1
            shard.write_bytes(data)
            return True
        return False


class Local(Place):
    """`demix run` on this machine; whoever sees it end unfinished gives the command again."""

    def __init__(self, study: Path, part: str, chance: random.Random) -> None:
        super().__init__(study, part, chance)
        self._process: subprocess.Popen | None = None
        self.faults |= {
            "SIGKILL of demix": lambda: self._signal(signal.SIGKILL),
            "SIGTERM": lambda: self._signal(signal.SIGTERM),
        }

    def start(self) -> None:
        command = [*DEMIX, self.part, str(self.study), "--runs", str(self.runs), "--quiet"]
        with open(self.runs / "output.log", "a") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)

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

    def __init__(self, study: Path, part: str, chance: random.Random, cluster) -> None:
        super().__init__(study, part, chance)
        self._cluster, self._looked, self._state = cluster, 0.0, "running"
        self.faults |= {
            "SIGKILL of a stage's task": lambda: self.kill(processes("megatron_demix.launch.stage", f"{self.run}/")),
            "SIGKILL of a batch script": lambda: self.kill(processes(f"{cluster.folder}/", "slurm_script")),
            "time limit (USR1)": lambda: self._on_a_job("scancel", "--signal=USR1", "--batch"),
            "scancel": lambda: self._on_a_job("scancel"),
            "scontrol requeue": lambda: self._on_a_job("scontrol", "requeue"),
            "node down": self._node_down,
            "SIGKILL of slurmctld": self._restart_controller,
        }

    def _demix(self, command: str, *more: str) -> subprocess.CompletedProcess:
        slurm = ["--set", "launch.backend=slurm", "--set", "parallel.data=2", "--set", "train.micro_batch_size=4"]
        arguments = [*DEMIX, command, str(self.study), "--runs", str(self.runs), *slurm, *more]
        return subprocess.run(arguments, env=self._cluster.environment, capture_output=True, text=True, timeout=200)

    def start(self) -> None:
        result = self._demix("submit")
        if result.returncode not in (0, 75):
            raise RuntimeError(result.stderr)
        self._state = "running"

    def state(self) -> str:
        """Asked of SLURM no more than once a second; what is published is looked at first."""
        if time.monotonic() - self._looked > 1:
            self._looked = time.monotonic()
            with contextlib.suppress(RuntimeError):
                self._state = "running" if self._cluster.jobs() else "stopped"
                if self._state == "stopped" and (self.run / "report" / "index.html").exists():
                    self._state = "done"
        return self._state

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

    def _restart_controller(self) -> bool:
        self._cluster.kill_daemon("slurmctld")
        time.sleep(1)
        self._cluster.start_daemon("slurmctld")
        self._cluster.wait_until_answering()
        return True


def processes(*words: str) -> list[int]:
    """Processes whose command line has all these words, other than torchrun's, which repeats that of its ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if "launch.ranks" not in line and "srun " not in line and all(word in line for word in words):
            found.append(int(path.parent.name))
    return found


def run_study(place: Place, num_faults: int, gap_s: float, chance: random.Random) -> dict:
    """Run one study to its end, with so many faults on the way, at random moments `gap_s` apart on average."""
    injected: Counter[str] = Counter()
    started, restarts = time.monotonic(), 0
    place.start()
    next_fault = time.monotonic() + chance.uniform(0, 2 * gap_s)
    while (state := place.state()) != "done":
        if time.monotonic() - started > LIMIT_S or restarts > 3 * num_faults + 3:
            break
        if state == "stopped":
            restarts += 1
            place.start()
        elif sum(injected.values()) < num_faults and time.monotonic() >= next_fault:
            name = chance.choice(sorted(place.faults))
            if place.faults[name]():
                injected[name] += 1
                next_fault = time.monotonic() + chance.uniform(0, 2 * gap_s)
        time.sleep(0.05)
    return {"finished": state == "done", "faults": dict(injected), "commands given again": restarts} | {
        "wall_s": round(time.monotonic() - started, 1)
    }


def artifacts(run: Path) -> dict[str, str]:
    """Digest of each artifact's manifest by its folder, after its files have been checked against it."""
    found = {}
    for path in sorted(run.rglob(MANIFEST)):
        if any(part.startswith(".") for part in path.relative_to(run).parts):
            continue
        manifest = Manifest.read(path.parent)
        assert manifest is not None
        problems = manifest.problems(path.parent, digests=True)
        found[path.parent.relative_to(run).as_posix()] = problems[0] if problems else hash_file(path)
    return found


def steps_done(run: Path) -> int:
    """Optimiser steps that all attempts together have logged (one line each, since log_interval is 1)."""
    return sum(line.count(" iteration ") for log in run.glob("logs/*.log") for line in log.open() if " | lm loss " in line)


def write_study(folder: Path) -> Path:
    """The study and its corpus: functions of the standard library as code, its docstrings and comments as words."""
    folder.mkdir(parents=True)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    code = [part for file in files for part in file.read_text(errors="replace").split("\n\n\n") if len(part) > 200]
    words = ["\n".join(line.strip(" #") for line in part.splitlines() if '"' not in line) for part in code]
    for name, texts in (("code", code), ("words", words)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (folder / "study.yaml").write_text(STUDY)
    return folder / "study.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["local", "slurm"], default="local")
    parser.add_argument("--studies", type=int, default=3)
    parser.add_argument("--faults", type=int, default=8, help="of each study")
    parser.add_argument("--gap", type=float, default=4.0, help="seconds between two faults, on average")
    parser.add_argument("--part", default="run", help="local: another command than run, as in train")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/faults_<backend>.json")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = None
        if options.backend == "slurm":
            sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
            from slurm_cluster import private_cluster

            cluster = stack.enter_context(private_cluster(root / "cluster"))

        def place(name: str) -> Place:
            study = write_study(root / name)
            if cluster is not None:
                return Slurm(study, options.part, chance, cluster)
            return Local(study, options.part, chance)

        undisturbed = place("undisturbed")
        reference = run_study(undisturbed, 0, options.gap, chance)
        if not reference["finished"]:
            raise RuntimeError(f"the undisturbed study was not finished: {reference}")
        wanted, steps = artifacts(undisturbed.run), steps_done(undisturbed.run)
        print(f"undisturbed: {len(wanted)} artifacts, {steps} steps, {reference['wall_s']:.0f} s", flush=True)
        rows = []
        for number in range(options.studies):
            disturbed = place(f"study{number}")
            row = run_study(disturbed, options.faults, options.gap, chance)
            found = artifacts(disturbed.run)
            row["artifacts different or missing"] = sorted(n for n in wanted if found.get(n) != wanted[n])
            row["steps repeated"] = steps_done(disturbed.run) - steps
            rows.append(row)
            print(f"study {number}: {json.dumps(row)}", flush=True)
    return report(options, rows, len(wanted), steps)


def report(options: argparse.Namespace, rows: list[dict], num_artifacts: int, steps: int) -> int:
    faults = sum((Counter(row["faults"]) for row in rows), Counter())
    summary = {
        "backend": options.backend,
        "faults": sum(faults.values()),
        "faults by kind": dict(sorted(faults.items())),
        "studies": len(rows),
        "studies finished": sum(row["finished"] for row in rows),
        "artifacts of each study": num_artifacts,
        "artifacts different or missing": sum(len(row["artifacts different or missing"]) for row in rows),
        "steps of each study": steps,
        "steps repeated": sum(row["steps repeated"] for row in rows),
        "commands given again": sum(row["commands given again"] for row in rows),
    }
    for name, value in summary.items():
        print(f"{name:32} {value}")
    output = options.output or Path(__file__).parent / "results" / f"faults_{options.backend}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"seed": options.seed, "gap_s": options.gap, "part": options.part, "cpus": os.cpu_count()}
    output.write_text(json.dumps({"settings": settings, "summary": summary, "studies": rows}, indent=1) + "\n")
    return 0 if summary["studies finished"] == len(rows) and not summary["artifacts different or missing"] else 1


if __name__ == "__main__":
    sys.exit(main())
