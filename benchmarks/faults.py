#!/usr/bin/env python3
"""Random faults over a small study, again and again: is every study finished, with the artifacts of an undisturbed run?

python benchmarks/faults.py --backend local --studies 5 --faults 8 --seed 1   # faults of each study, on this machine
python benchmarks/faults.py --backend slurm --studies 2 --faults 8 --seed 2   # on a private SLURM of two nodes (slurm-wlm)

Prints a table and adds it to a JSON file: the faults injected by kind; studies finished; artifacts whose bytes differ from the
undisturbed run's; optimiser steps done more than once; how often the command had to be given again by hand, or a node that
SLURM had drained had to be given back. The file holds every run, by its backend and seed, and their total. Full disks need the
right to mount one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path

from fault_places import Local, Place, Slurm, small_disk

from megatron_demix.artifact import MANIFEST, Manifest, hash_file, read_json, write_json

LIMIT_S = 1800
PATIENCE_S = 30
"""How long a kind of fault waits for something to harm: without it, those that need ranks would be rare."""
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
component: {maturity_seeds: 0, tokens: 51200}                # 200 steps
search: {rounds: [8], objective: {code: 0.7, words: 0.3}, candidates: 1000, top: 16}
evaluate: {tokens_per_domain: 1k}
final: {tokens: 25600, baselines: []}
launch: {jobs: 2, slurm: {ranks_per_node: 1, cpus_per_task: 1, time: 6min, grace: 60, setup: "export GLOO_SOCKET_IFNAME=lo"}}
"""


def run_study(place: Place, num_faults: int, gap_s: float, chance: random.Random) -> dict:
    """Run one study to its end, with so many faults on the way, at random moments `gap_s` apart on average."""
    injected: Counter[str] = Counter()
    started, restarts = time.monotonic(), 0
    if num_faults:
        place.start_twice()
        injected["two commands at once"] = 1
    else:
        place.start()
    next_fault = time.monotonic() + chance.uniform(0, 2 * gap_s)
    name = chance.choice(sorted(place.faults))
    while (state := place.state()) != "done":
        if time.monotonic() - started > LIMIT_S or restarts > 3 * num_faults + 3:
            break
        if state == "stopped":
            restarts += 1
            place.start()
        elif sum(injected.values()) < num_faults and (late_s := time.monotonic() - next_fault) >= 0:
            if hit := place.faults[name]():
                injected[name] += 1
                next_fault = time.monotonic() + chance.uniform(0, 2 * gap_s)
            if hit or late_s > PATIENCE_S:
                name = chance.choice(sorted(place.faults))
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


def passed_over(run: Path) -> int:
    """Damaged checkpoints that a log says were passed over."""
    return sum(log.read_text(errors="replace").count("is damaged: ") for log in run.glob("logs/*.log"))


def write_study(folder: Path) -> Path:
    """The study and its corpus: functions of the standard library as code, its docstrings and comments as words."""
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
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "faults.json")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = None
        if options.backend == "slurm":
            from slurm_cluster import private_cluster

            cluster = stack.enter_context(private_cluster(root / "cluster"))

        def place(name: str) -> Place:
            own_disk = stack.enter_context(small_disk(root / name))
            study = write_study(root / name)
            if cluster is not None:
                return Slurm(study, options.part, chance, cluster, own_disk=own_disk)
            return Local(study, options.part, chance, own_disk=own_disk)

        undisturbed = place("undisturbed")
        reference = run_study(undisturbed, 0, options.gap, chance)
        if not reference["finished"]:
            raise RuntimeError(f"the undisturbed study was not finished: {reference}")
        wanted, steps = artifacts(undisturbed.run), steps_done(undisturbed.run)
        print(f"undisturbed: {len(wanted)} artifacts, {steps} steps, {reference['wall_s']:.0f} s", flush=True)
        settings = {"gap_s": options.gap, "part": options.part, "cpus": os.cpu_count()}
        settings |= {"artifacts of a study": len(wanted), "steps of a study": steps}
        rows: list[dict] = []
        for number in range(options.studies):
            disturbed = place(f"study{number}")
            row = run_study(disturbed, options.faults, options.gap, chance)
            found = artifacts(disturbed.run)
            row["artifacts different or missing"] = sorted(n for n in wanted if found.get(n) != wanted[n])
            row["steps repeated"] = steps_done(disturbed.run) - steps
            row["damaged checkpoints passed over"] = passed_over(disturbed.run)
            row["nodes given back by hand"] = disturbed.nodes_given_back
            rows.append(row)
            print(f"study {number}: {json.dumps(row)}", flush=True)
            write(options.output, f"{options.backend}, seed {options.seed}", settings, rows)
    summary = summarise(rows)
    for name, value in summary.items():
        print(f"{name:32} {value}")
    return 0 if summary["studies finished"] == len(rows) and not summary["artifacts different or missing"] else 1


def summarise(rows: list[dict]) -> dict:
    """What happened to these studies together."""
    faults = sum((Counter(row["faults"]) for row in rows), Counter())
    return {
        "faults": sum(faults.values()),
        "faults by kind": dict(sorted(faults.items())),
        "studies": len(rows),
        "studies finished": sum(row["finished"] for row in rows),
        "artifacts different or missing": sum(len(row["artifacts different or missing"]) for row in rows),
        "damaged checkpoints passed over": sum(row["damaged checkpoints passed over"] or 0 for row in rows),
        "steps repeated": sum(row["steps repeated"] for row in rows),
        "commands given again": sum(row["commands given again"] for row in rows),
        "nodes given back by hand": sum(row.get("nodes given back by hand", 0) for row in rows),
    }


def write(path: Path, name: str, settings: dict, rows: list[dict]) -> None:
    """Add a run to the file, or replace the one of that name: after every study, so that what is interrupted counts."""
    runs = read_json(path)["runs"] if path.exists() else {}
    runs[name] = {"settings": settings, "summary": summarise(rows), "studies": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"total": summarise([row for run in runs.values() for row in run["studies"]]), "runs": runs})


if __name__ == "__main__":
    sys.exit(main())
