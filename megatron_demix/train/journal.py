"""What a run tells the outside while it trains: losses.jsonl, validation.jsonl, TensorBoard, a heartbeat file, a line now and
then."""

from __future__ import annotations

import time
from collections.abc import Mapping

from megatron_demix.progress import Heartbeat
from megatron_demix.train.derived import flops_per_token, padded_vocab_size
from megatron_demix.train.job import TrainJob
from megatron_demix.train.losses import FILE, VALIDATION, LossLog, read_losses
from megatron_demix.train.stragglers import Straggler
from megatron_demix.train.throughput import device_memory_bytes, device_peak_flops
from megatron_demix.units import format_bytes, format_count


class Journal:
    """Kept by rank 0 alone; on other ranks make none."""

    def __init__(self, job: TrainJob, *, iteration: int) -> None:
        """iteration: the last one that is done. Raises CorruptInput where losses.jsonl lacks what was done."""
        self._job = job
        self._losses = LossLog(job.work / FILE, iteration=iteration)
        self._validation = LossLog(job.work / VALIDATION, iteration=iteration, gaps=True) if job.valid else None
        self.evaluated = max((int(row["iteration"]) for row in read_losses(job.work / VALIDATION)), default=0)
        """The last iteration that was evaluated."""
        self._heartbeat = Heartbeat(job.heartbeat) if job.heartbeat else None
        self._scalars = None
        if job.tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._scalars = SummaryWriter(str(job.tensorboard), purge_step=iteration + 1)
        self._flops_per_token = flops_per_token(
            job.model, job.train.seq_length, padded_vocab_size(job.model, job.parallel, job.vocab_size)
        )
        self._since, self._seen = time.perf_counter(), iteration
        self._beat(iteration)

    def step(self, row: Mapping[str, float], beside: Mapping[str, float]) -> None:
        """One iteration is done. row: as losses.read_losses describes. beside: what TensorBoard shows with it."""
        iteration = int(row["iteration"])
        self._losses.append(row)
        self._beat(iteration, loss=row["lm loss"])
        self._show({**row, **beside})

    def evaluation(self, row: Mapping[str, float]) -> None:
        """An iteration has been evaluated. row: as losses.read_losses describes."""
        assert self._validation is not None
        self._validation.append(row)
        self._show(row)

    def _show(self, row: Mapping[str, float]) -> None:
        if self._scalars:
            for name, value in row.items():
                if name != "iteration":
                    self._scalars.add_scalar(name, value, int(row["iteration"]))

    def speak(self, row: Mapping[str, float], straggler: Straggler | None) -> None:
        """A line about the iterations since the last one. row: of the last one done, with what is beside it and its
        evaluation."""
        iteration = int(row["iteration"])
        now = time.perf_counter()
        seconds = (now - self._since) / max(1, iteration - self._seen)
        tokens_per_s = self._job.train.global_batch_size * self._job.train.seq_length / seconds
        self._since, self._seen = now, iteration
        scalars = {
            "iteration-time": seconds,
            "batch-size": self._job.train.global_batch_size,
            "demix/tokens-per-second": tokens_per_s,
        }
        parts = [f"{self._job.name} iteration {iteration}/{self._job.train_iters}"]
        parts += [f"{name} {value:.4f}" for name, value in row.items() if "loss" in name]
        parts += [
            f"lr {row['learning-rate']:.3e}",
            f"grad norm {row['grad-norm']:.3f}",
            f"{format_count(tokens_per_s)} tokens/s",
        ]
        if peak := device_peak_flops(self._job.train.precision):
            mfu = tokens_per_s * self._flops_per_token / (peak * self._job.parallel.world_size)
            scalars["demix/mfu"] = mfu
            parts.append(f"MFU {100 * mfu:.1f} %")
        if memory := device_memory_bytes():
            scalars["demix/gpu-memory-bytes"] = memory
            parts.append(format_bytes(memory))
        if straggler:
            scalars["demix/slowest-rank-over-median"] = straggler.ratio
            if straggler.is_notable:
                parts.append(f"rank {straggler.rank} on {straggler.host} takes {straggler.ratio:.1f} x the median")
        if self._scalars:
            for name, value in scalars.items():
                self._scalars.add_scalar(name, value, iteration)
        print(" | ".join(parts), flush=True)

    def _beat(self, iteration: int, **facts: float) -> None:
        if self._heartbeat:
            self._heartbeat.beat(iteration, self._job.train_iters, "iterations", **facts)

    def sync(self) -> None:
        """Make losses.jsonl and validation.jsonl durable up to here: called before the checkpoint that relies on them. Raises
        StorageError."""
        for log in filter(None, (self._losses, self._validation)):
            log.sync()

    def close(self) -> None:
        for log in filter(None, (self._losses, self._validation)):
            log.close()
        if self._scalars:
            self._scalars.close()
