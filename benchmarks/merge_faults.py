#!/usr/bin/env python3
"""Random faults under merges: is anything wrong ever published, and does anything left over stop the next run?

python benchmarks/merge_faults.py --faults 200 --work build/merge_faults      # so many faults of each kind in turn

A fault hits a merge of three small components into four mixtures, in processes of its own; then the same merge is given again,
unharmed. What bears a final name must at every moment have the bytes of an undisturbed merge, the second run must end with all
of them, and nothing temporary may stay. A damaged component must be refused, unless the damage changes nothing that is merged.
Prints a table, writes JSON, and ends with 1 if anything of this did not hold. The disk that fills is a small tmpfs, which only
root can mount: elsewhere that kind is left out.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a forked process must not wait for threads of its parent

import torch
from merge_inputs import write_component

from megatron_demix.checkpoint import writer
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import DemixError
from megatron_demix.merge.engine import merge_checkpoints

SHAPES = {
    "embedding.word_embeddings.weight": (512, 128),
    "decoder.layers.self_attention.linear_qkv.weight": (4, 256, 128),
    "decoder.layers.self_attention.linear_proj.weight": (4, 128, 128),
    "decoder.layers.mlp.linear_fc1.weight": (4, 768, 128),
    "decoder.layers.mlp.linear_fc2.weight": (4, 128, 384),
    "decoder.final_layernorm.weight": (128,),
}
MIXTURES = {f"m{i}": {"a": 0.5, "b": i / 8, "c": 0.5 - i / 8} for i in range(4)}
RESULTS = Path(__file__).resolve().parent / "results" / "merge_faults.json"
LIMIT_S = 60

Tree = dict[str, bytes]


class Harm(Exception):
    """A promise that a fault broke."""


class Faults:
    """The components, an undisturbed merge of them, and harm done to others."""

    def __init__(self, work: Path, chance: random.Random) -> None:
        self.work, self.chance = work, chance
        self.parts = {name: work / "parts" / name for name in "abc"}
        for seed, folder in enumerate(self.parts.values()):
            write_component(folder, SHAPES, seed, beside=beside_the_model())
        self.out = work / "out"
        started = time.monotonic()
        code = self.finish(self.start(self.parts, self.out))
        self.took = time.monotonic() - started
        if code:
            raise SystemExit(f"the undisturbed merge ended with {code}")
        self.whole = tree(self.out)
        self.whole_out = self.out.rename(work / "whole")
        self.kinds: dict[str, Callable[[], str]] = {
            "SIGKILL": self.kill,
            "SIGKILL of workers": self.kill_workers,
            "byte of a payload": lambda: self.flip("payload"),
            "byte of an archive's frame": lambda: self.flip("frame"),
            "byte of .metadata": lambda: self.flip(".metadata"),
            "byte of common.pt": lambda: self.flip("common.pt"),
            "file cut short": self.truncate,
            "file cut short while read": self.truncate_under,
            "file size limit": self.file_size_limit,
        }
        if can_mount(work):
            self.kinds["disk that fills"] = self.full_disk

    # --- merges in processes of their own -----------------------------------------------------------------------------

    def start(
        self,
        parts: dict[str, Path],
        out: Path,
        worker: tuple[int, int] | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> int:
        """The process that merges; it ends with an exit code of the tool, or 1 after any error that is a bug."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            quiet = os.open(self.work / "output.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            writer._FILE_BYTES = 512 << 10  # several files, so that workers share one checkpoint
            before()
            merge_checkpoints(parts, MIXTURES, out, worker=worker, threads=2, progress=False, verify="sample")
            code = 0
        except DemixError as e:
            code = e.exit_code  # first: where files may not grow, the next line fails
            print(repr(e), file=sys.stderr, flush=True)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def finish(self, pid: int) -> int:
        """The exit code; negative: of the signal that ended it."""
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise Harm(f"a merge did not end within {LIMIT_S} s")

    # --- faults: each returns what became of the merge ----------------------------------------------------------------

    def kill(self) -> str:
        pid = self.start(self.parts, self.out)
        time.sleep(self.chance.uniform(0, 1.1 * self.took))
        os.kill(pid, signal.SIGKILL)
        return described(self.finish(pid))

    def kill_workers(self) -> str:
        """Any of three workers; then any number of other workers makes the rest."""
        pids = [self.start(self.parts, self.out, (i, 3)) for i in range(3)]
        for pid in self.chance.sample(pids, self.chance.randint(1, 3)):
            time.sleep(self.chance.uniform(0, 0.7 * self.took))
            os.kill(pid, signal.SIGKILL)
        codes = [self.finish(pid) for pid in pids]
        for code in codes:
            if code not in (0, -signal.SIGKILL):
                raise Harm(f"a worker beside one that was killed ended with {code}")
        self.check_published()
        others = self.chance.randint(1, 4)
        for i in self.chance.sample(range(others), others):
            if code := self.finish(self.start(self.parts, self.out, (i, others))):
                raise Harm(f"a worker after one that was killed ended with {code}")
        return "killed" if any(codes) else "finished"

    def flip(self, where: str) -> str:
        """One bit of one component."""
        # Of the others, common.pt is not read.
        parts, folder = self.copied("a" if where == "common.pt" else None)
        file = folder / where
        if where in ("payload", "frame"):
            checkpoint = Checkpoint(folder)
            info = self.chance.choice(sorted(checkpoint.metadata.tensors.values(), key=lambda info: info.key))
            chunk = self.chance.choice(info.chunks)
            file = folder / chunk.location.file
            blob = file.read_bytes()[chunk.location.position :][: chunk.location.length]
            record = checkpoint.payload(info, chunk).record.tobytes()
            begin = blob.index(record)
            inside, around = range(begin, begin + len(record)), [*range(begin), *range(begin + len(record), len(blob))]
            at = chunk.location.position + self.chance.choice(inside if where == "payload" else around)
            del checkpoint
        else:
            at = self.chance.randrange(file.stat().st_size)
        data = bytearray(file.read_bytes())
        data[at] ^= 1 << self.chance.randrange(8)
        file.write_bytes(data)
        return self.merge_damaged(parts)

    def truncate(self) -> str:
        parts, folder = self.copied()
        file = self.chance.choice([p for p in sorted(folder.iterdir()) if p.name != "metadata.json"])
        os.truncate(file, self.chance.randrange(file.stat().st_size))
        return self.merge_damaged(parts)

    def truncate_under(self) -> str:
        parts, folder = self.copied()
        file = self.chance.choice(sorted(folder.glob("*.distcp")))
        size = self.chance.randrange(file.stat().st_size)
        pid = self.start(parts, self.out)
        time.sleep(self.chance.uniform(0, self.took))
        os.truncate(file, size)
        return described(self.finish(pid))

    def file_size_limit(self) -> str:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))

        largest = max(map(len, self.whole.values()))
        at = self.chance.randrange(largest)
        return described(self.finish(self.start(self.parts, self.out, before=limit)))

    def full_disk(self) -> str:
        """A disk that others fill, before or while the merge writes."""
        room = sum(map(len, self.whole.values())) + (1 << 20)
        with mounted(self.work / "small", room) as disk:
            out, self.out = self.out, disk / "out"
            try:
                pid = self.start(self.parts, self.out)
                time.sleep(self.chance.uniform(0, self.took))
                with suppress(OSError), open(disk / "others", "wb") as file:
                    while True:
                        file.write(bytes(1 << 16))
                code = self.finish(pid)
                self.check_published()
                (disk / "others").unlink()
                self.run_again()
            finally:
                self.out = out
        return described(code)

    def copied(self, name: str | None = None) -> tuple[dict[str, Path], Path]:
        """The components with a copy of one of them (None: any), to be damaged."""
        name = name or self.chance.choice(sorted(self.parts))
        folder = self.work / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.parts[name], folder)
        return self.parts | {name: folder}, folder

    def merge_damaged(self, parts: dict[str, Path]) -> str:
        code = self.finish(self.start(parts, self.out))
        if code != 0:
            return described(code)
        try:
            self.check_published()
        except Harm:
            # What is copied keeps bytes that mean nothing, such as padding. What is read must be the same, or not be read.
            found = {as_torch_reads(self.whole_out / name, self.out / name) for name in MIXTURES}
            if "other" in found:
                raise
            shutil.rmtree(self.out)
            return "finished, but torch refuses to read it" if "refused" in found else "finished"
        return "finished"

    # --- what must hold after each ------------------------------------------------------------------------------------

    def check_published(self) -> None:
        for name in os.listdir(self.out) if self.out.exists() else ():
            if not name.startswith("."):
                found = {f"{name}/{file}": data for file, data in tree(self.out / name).items()}
                expected = {file: data for file, data in self.whole.items() if file.startswith(f"{name}/")}
                if found != expected:
                    raise Harm(f"{name} was published and is not what an undisturbed merge makes")

    def run_again(self) -> None:
        if code := self.finish(self.start(self.parts, self.out)):
            raise Harm(f"the merge after the fault ended with {code}")
        if tree(self.out) != self.whole:
            raise Harm("the merge after the fault left other files than an undisturbed one")

    def one(self, kind: str) -> str:
        """Do harm of a kind; what became of the merge, or "HARM: ..." where a promise was broken."""
        try:
            outcome = self.kinds[kind]()
            self.check_published()
            if outcome.startswith("died"):
                raise Harm(outcome)
            self.run_again()
            return outcome
        except Harm as e:
            return f"HARM: {e}"
        finally:
            shutil.rmtree(self.out, ignore_errors=True)


def beside_the_model() -> dict[str, torch.Tensor | bytes]:
    """What a training run saves that is copied, or left alone: extra states, a tensor of integers, an optimizer's state."""
    state = io.BytesIO()
    torch.save({"scale": torch.ones(3)}, state)
    extra = {f"decoder.layers.mlp.linear_fc1._extra_state/shard_{layer}_4": state.getvalue() for layer in range(4)}
    return extra | {"decoder.layers.mlp.router.tokens": torch.arange(64), "optimizer.state.exp_avg.w": torch.randn(64, 64)}


def described(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed"
    if code < 0 or code == 1:
        return f"died ({signal.Signals(-code).name if code < 0 else 'of a bug'})"
    return "finished" if code == 0 else f"refused ({code})"


def tree(folder: Path) -> Tree:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def as_torch_reads(sound: Path, merged: Path) -> str:
    """What torch's loader reads of a merge: the "same" as of a sound one, something "other", or "refused"."""
    import torch.distributed.checkpoint as dcp

    described = dcp.FileSystemReader(sound / "release").read_metadata().state_dict_metadata

    def read(folder: Path) -> dict[str, bytes]:
        state = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype) if hasattr(entry, "chunks") else io.BytesIO()
            for key, entry in described.items()
        }
        dcp.load(state, checkpoint_id=folder / "release", no_dist=True)
        found = {}
        for key, value in state.items():
            tensor = value if isinstance(value, torch.Tensor) else value["scale"]
            found[key] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        return found

    expected = read(sound)
    try:
        return "same" if read(merged) == expected else "other"
    except (Exception, dcp.api.CheckpointException):
        return "refused"


@contextmanager
def mounted(folder: Path, num_bytes: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_mount(work: Path) -> bool:
    try:
        with mounted(work / "small", 1 << 16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="in all (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="an empty or absent folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    faults = Faults(arguments.work.resolve(), random.Random(arguments.seed))
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in faults.kinds}
    for i in range(arguments.faults):
        kind = list(faults.kinds)[i % len(faults.kinds)]
        outcomes[kind][faults.one(kind)] += 1
    for kind, found in outcomes.items():
        print(f"{kind:28} {sum(found.values()):5}  " + ", ".join(f"{what}: {n}" for what, n in sorted(found.items())))
    harm = sum(n for found in outcomes.values() for what, n in found.items() if what.startswith("HARM"))
    print(f"{arguments.faults} faults, {harm} broken promises")
    command = f"python benchmarks/merge_faults.py --faults {arguments.faults} --seed {arguments.seed} --work DIR"
    result = {"command": command, "faults": arguments.faults, "broken_promises": harm, "outcomes": outcomes}
    arguments.output.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    return 1 if harm else 0


if __name__ == "__main__":
    sys.exit(main())
