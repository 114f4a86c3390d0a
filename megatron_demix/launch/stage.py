"""One stage, made on the node or nodes this process was started on.

`python -m megatron_demix.launch.stage STUDY STAGE --run DIR` on every node, with the node's number in NODE_RANK (or SLURM's own
SLURM_NODEID), is all that a scheduler has to start. Node 0 checks that the needs are done, prepares and publishes; every node
starts its own ranks. Exit codes: 0 the artifact is there; 75 start it again; another: starting it again is of no use.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_demix.artifact import remove_leftovers, write_atomic
from megatron_demix.errors import (
    ConfigError,
    CorruptInput,
    DemixError,
    Diverged,
    EndedEarly,
    FaultFound,
    IncompatibleInputs,
    Incomplete,
    MixtureError,
    OutputExists,
    RerunAsked,
    StageFailed,
    StorageError,
    VerificationFailed,
    limit_reached,
)
from megatron_demix.exits import warn_in_lines
from megatron_demix.launch.attempts import Attempts, of_stage
from megatron_demix.launch.started import Started
from megatron_demix.locks import is_locked, look_at_lock, open_lock, take_lock
from megatron_demix.pipeline import preflight
from megatron_demix.pipeline.stage import Stage
from megatron_demix.process import PYTHON_M, die_with_parent, leave_usr1_to_parent
from megatron_demix.progress import METRICS, MetricsLog
from megatron_demix.train.watch import STOP_SIGNALS

FINAL = (
    ConfigError,
    IncompatibleInputs,
    MixtureError,
    VerificationFailed,
    OutputExists,
    CorruptInput,
    Diverged,
    FaultFound,
    StorageError,
)
"""Errors that come again when the stage is started again."""
_BY_EXIT_CODE: dict[int, type[DemixError]] = {c.exit_code: c for c in (*FINAL, RerunAsked, Incomplete)}
_SAID = {
    RerunAsked.exit_code: "Megatron-LM met a result that it could not repeat, and has saved. Run again: it then finds out "
    "whether that was chance or a broken device",
    FaultFound.exit_code: "Megatron-LM found results that are wrong or cannot be repeated, which is mostly a broken device. "
    "Its log says which rank; run again without that machine",
}
_NEEDS_WAIT_S = 60
_RANKS_SAVE_S = 60
_POLL_S = 5
_STOP_SIGNALS = (*STOP_SIGNALS, signal.SIGINT)
_OF_RANKS = ("NODE_RANK", "GROUP_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""What torchrun tells its ranks. A rank that it does not start would take another launcher's for its own."""
_LINGER_S = 10
"""Schedulers kill all tasks of a job when one fails: the other nodes' tasks leave node 0 the time to say why."""


@dataclass(frozen=True)
class Nodes:
    """Where a stage's ranks are: this node's number, how many there are, and node 0's address."""

    rank: int = 0
    number: int = 1
    address: str = ""
    port: int = 0

    def log(self, stage: Stage) -> Path:
        """Of this node's ranks."""
        return stage.log if self.rank == 0 else stage.log.with_suffix(f".node{self.rank}.log")


def start_ranks(
    stage: Stage, *, threads_per_rank: int, lock: IO | None, nodes: Nodes = Nodes(), devices: Sequence[str] = ()
) -> subprocess.Popen:
    """Start this node's ranks of a stage that has begun.

    lock: the stage's, which becomes shared with the ranks: each takes it for itself, so that it is free when all of them have
    ended, even where torchrun was killed and they still save. devices: the GPUs they may use; none: whatever there is.
    """
    if lock:
        take_lock(lock, f"another process that makes stage {stage.name}", wait_s=0, shared=True)
    command = [*PYTHON_M, "megatron_demix.pipeline.worker", str(stage.job)]
    if stage.ranks > 1:  # torchrun costs seconds, and has nothing to do for one rank
        group = ["--standalone"]
        if nodes.number > 1:
            group = [f"--nnodes={nodes.number}", f"--node-rank={nodes.rank}"]
            group += [f"--master-addr={nodes.address}", f"--master-port={nodes.port}"]
        group += [f"--nproc-per-node={stage.ranks // nodes.number}", "--no-python"]
        command = [*PYTHON_M, "megatron_demix.launch.ranks", *group, *command]
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
    environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    with open(nodes.log(stage), "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment | {"OMP_NUM_THREADS": str(threads_per_rank), "PYTHONUNBUFFERED": "1"} | visible,
            pass_fds=[lock.fileno()] if lock else [],
            start_new_session=True,  # Ctrl-C reaches us alone; we pass it on as SIGTERM
            preexec_fn=leave_usr1_to_parent,  # and so SIGUSR1: torchrun, Megatron-LM and data loaders would die of it
        )


@contextmanager
def stage_lock(stage: Stage) -> Iterator[IO]:
    """Held by whoever makes a stage, and by the ranks it started. Raises Incomplete if others have it for too long."""
    stage.lock.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(stage.lock) as file:
        take_lock(file, f"processes of stage {stage.name} that an earlier run started", wait_s=_RANKS_SAVE_S)
        yield file


def is_being_made(stage: Stage) -> bool:
    """Whether some process has a stage's lock now."""
    try:
        with look_at_lock(stage.lock) as file:
            return is_locked(file)
    except FileNotFoundError:
        return False


def failure(stage: Stage, code: int, nodes: Nodes = Nodes()) -> DemixError:
    """What the exit code of this node's ranks means, with the first rank's own message where their log has one.

    code: as of a process or a shell: negative, or above 128, for a signal.
    """
    log = nodes.log(stage)
    tail = log.read_text(errors="replace").splitlines()[-12:] if log.exists() else []
    said = [line.split(": ", 1)[1] for line in tail if line.startswith("error (rank")]
    if code in _BY_EXIT_CODE:
        return _BY_EXIT_CODE[code](f"stage {stage.name}: {said[0] if said else _SAID.get(code, 'stopped')} (log: {log})")
    if said:
        return StageFailed(f"stage {stage.name}: {said[0]} (log: {log})")
    signum = -code if code < 0 else code - 128
    reason = f"was killed by signal {signum}" if signum > 0 else f"ended with exit code {code}"
    excerpt = "".join(f"\n    {line}" for line in tail)
    return StageFailed(
        f"stage {stage.name}: a rank {reason}. Finished artifacts are intact; run the same command again to "
        f"go on from its last checkpoint. Log: {log}, which ends{excerpt or ' empty'}"
    )


class _Stop:
    """SIGTERM, SIGUSR1, SIGINT: passed on to the ranks as SIGTERM, so that they save; without ranks, Incomplete is raised.

    settled: what becomes of the stage is known, and no signal replaces it, such as the SIGTERM that srun sends to all tasks
    when one has ended. Blocking would not do: libraries have threads, and one that blocks nothing hears it.
    """

    def __init__(self) -> None:
        self.asked = self.settled = self.is_last_call = self.is_out_of_time = False
        self.ranks: subprocess.Popen | None = None
        for signum in _STOP_SIGNALS:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: object) -> None:
        self.asked = True
        self.is_last_call |= signum == signal.SIGTERM
        if self.settled:
            return
        self.is_out_of_time |= signum == signal.SIGUSR1
        if self.ranks is None:
            raise Incomplete(f"stopped by {signal.Signals(signum).name}.")
        self.ranks.terminate()

    def ignore(self) -> None:
        """Until the process is gone: Python gives up handlers some time before that."""
        for signum in _STOP_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)

    def linger(self) -> None:
        """Until SIGTERM has come, at most _LINGER_S."""
        deadline = time.monotonic() + _LINGER_S
        while not self.is_last_call and time.monotonic() < deadline:
            time.sleep(0.1)

    def wait(self, ranks: subprocess.Popen, until: Callable[[], bool]) -> int:
        """The ranks' exit code, 0 if `until` comes true before they end: then they are stopped."""
        self.ranks = ranks
        while True:
            try:
                code = ranks.wait(timeout=_POLL_S)
                break
            except subprocess.TimeoutExpired:
                if until():
                    ranks.kill()
                    ranks.wait()
                    return 0
        self.ranks = None
        # A rank that was still importing, or that scores and saves every row anyway, dies from the signal.
        return Incomplete.exit_code if self.asked and code in (-signal.SIGTERM, 128 + signal.SIGTERM) else code


def make(stage: Stage, *, threads_per_rank: int, nodes: Nodes, stop: _Stop) -> None:
    """Make one stage. Raises the error that kept it from being made; Incomplete after a signal, with everything saved."""
    if stage.done():
        return
    if nodes.rank > 0:
        stage.log.parent.mkdir(parents=True, exist_ok=True)
        _wait_for_ranks(stage, threads_per_rank, None, nodes, stop)
        return
    started = time.monotonic()
    with stage_lock(stage) as held:
        if stage.done():  # by whoever held the lock
            return
        if stage.folder.parent.is_dir():
            remove_leftovers(stage.folder.parent)
        if stage.ranks and stage.begin():
            _wait_for_ranks(stage, threads_per_rank, held, nodes, stop)
        stage.finish()
    log_time(stage, started)


def log_time(stage: Stage, started: float) -> float:
    """Seconds that a finished stage took since `started` (time.monotonic), also for the report."""
    wall_s = round(time.monotonic() - started, 3)
    MetricsLog(stage.run / METRICS).write("stage", name=stage.name, key=stage.key, wall_s=wall_s)
    return wall_s


def _wait_for_ranks(stage: Stage, threads_per_rank: int, held: IO | None, nodes: Nodes, stop: _Stop) -> None:
    ranks = start_ranks(stage, threads_per_rank=threads_per_rank, lock=held, nodes=nodes)
    # Ranks of other nodes would wait in vain for a node 0 that found that it needs none.
    code = stop.wait(ranks, until=stage.done if nodes.rank > 0 else lambda: False)
    if code != 0:
        raise failure(stage, code, nodes)


class NeedMissing(StageFailed):
    """The stage was started too early: the scheduler lost the job it was to wait for. What is missing has to be made first."""


def _wait_for_needs(stage: Stage) -> None:
    """Needs were done when this was started; another node's view of a network file system may lag."""
    deadline = time.monotonic() + _NEEDS_WAIT_S
    while missing := [n.name for n in stage.needs if not n.done()]:
        if time.monotonic() >= deadline:
            raise NeedMissing(f"stage {stage.name}: needs {', '.join(missing)}, which is not done.")
        time.sleep(1)


def _make_and_judge(
    stage: Stage,
    threads_per_rank: int,
    nodes: Nodes,
    stop: _Stop,
    outcome: Path | None = None,
    beside: Sequence[Stage] = (),
) -> int:
    """Exit code of what this node does of the stage; node 0 keeps the account of attempts.

    beside: stages that are to be made, too; this one is not begun where the data cannot fill one of them. outcome: as of
    --outcome. A signal to one of several nodes that nobody asked for is a failure: srun stopped what was left
    when another node's ranks had ended.
    """
    attempts, begun = Attempts(), False
    try:
        if nodes.rank == 0 and not stage.done():
            _wait_for_needs(stage)
            preflight.check(beside)
            attempts = Attempts.read(stage)
            attempts.asked |= outcome is not None and _was_preempted(outcome)
            attempts.begin(stage)
            begun = True
        make(stage, threads_per_rank=threads_per_rank, nodes=nodes, stop=stop)
        stop.settled = True
        return 0
    except Exception as raised:
        stop.settled = True
        e = limit_reached(raised) or raised
        if isinstance(e, Incomplete) and stop.asked and nodes.number > 1 and outcome and not _asked(outcome).exists():
            e = StageFailed(
                f"stage {stage.name}: another node ended first, and this one was stopped with it. Logs of all "
                f"nodes: {stage.log.with_suffix('')}*.log"
            )
        said = str(e) if isinstance(e, DemixError) else traceback.format_exc().rstrip()
        said = of_stage(stage, said)
        print(f"demix: {said}", file=sys.stderr, flush=True)
        over = isinstance(e, FINAL) or attempts.over
        if (nodes.rank == 0 or over) and not isinstance(e, NeedMissing):
            with suppress(OSError, StorageError):  # its disk may be full, or gone
                if over:
                    attempts.failed = said
                    attempts.write(stage)
                    if stage.whole is not stage:
                        Attempts(failed=said).write(stage.whole)
                elif begun and isinstance(e, Incomplete) and not isinstance(e, EndedEarly):
                    attempts.asked = True
                    attempts.timed += stop.is_out_of_time
                    attempts.write(stage)
                with open(nodes.log(stage), "a") as log:
                    log.write(f"demix: {said}\n")
        if nodes.rank > 0:
            stop.linger()
        return e.exit_code if isinstance(e, DemixError) and (over or isinstance(e, NeedMissing)) else Incomplete.exit_code


def _asked(outcome: Path) -> Path:
    """The batch script's note that SLURM, or a person, wants the job to end."""
    return Path(f"{outcome}.asked")


def _was_preempted(outcome: Path) -> bool:
    """The batch script's note that SLURM gave this job's last start up for another job; it is of no further use."""
    note = outcome.with_suffix(".preempted")
    with suppress(FileNotFoundError):
        note.unlink()
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("stage")
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--root", type=Path, help="folder that relative inputs start from (default: the study file's)")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes; MASTER_ADDR and MASTER_PORT name node 0")
    parser.add_argument(
        "--outcome",
        type=Path,
        help="file for node 0's exit code, but not for a 75 from before it kept an account; OUTCOME.n: node n's, where it is "
        "final; OUTCOME.asked: made by the scheduler's script when it is asked to stop; with .preempted for its ending: when "
        "the last start was ended for another job",
    )
    options = parser.parse_args()
    nodes = Nodes(
        rank=int(os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID", 0))),
        number=options.nodes,
        address=os.environ.get("MASTER_ADDR", ""),
        port=int(os.environ.get("MASTER_PORT", 0)),
    )
    die_with_parent()
    warn_in_lines()
    stop, known = _Stop(), False
    try:
        from megatron_demix.pipeline.dag import MILESTONES, build_dag
        from megatron_demix.study.load import load_study

        study = load_study(options.study)
        dag = build_dag(study, options.root or options.study, options.run)
        stage = dag.stage(options.stage)
        last = Started.read(dag.run)
        beside = dag.foreseen(last.until if last else None) if stage.kind not in MILESTONES["prepare"] | {"clean"} else []
        known = True
    except Exception as e:
        stop.settled = True
        print(f"demix: {e}" if isinstance(e, DemixError) else traceback.format_exc().rstrip(), file=sys.stderr, flush=True)
        code = e.exit_code if isinstance(e, DemixError) else 1
    else:
        code = _make_and_judge(stage, study.launch.threads_per_rank, nodes, stop, options.outcome, beside)
    stop.ignore()
    final = code not in (0, Incomplete.exit_code)
    if options.outcome and (final or (known and nodes.rank == 0)):
        with suppress(StorageError):  # then the scheduler has to judge by what it is told
            write_atomic(options.outcome if nodes.rank == 0 else Path(f"{options.outcome}.{nodes.rank}"), str(code))
    return code


if __name__ == "__main__":
    sys.exit(main())
