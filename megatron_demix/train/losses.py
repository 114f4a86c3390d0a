"""losses.jsonl: one line an iteration, and validation.jsonl: one an evaluation; without times, so that equal runs write equal
files. And the guard that reads the first."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from megatron_demix.artifact import write_atomic
from megatron_demix.errors import CorruptInput, Diverged, storage_errors
from megatron_demix.study.training import TrainSpec

FILE, VALIDATION = "losses.jsonl", "validation.jsonl"


def read_losses(path: Path) -> list[dict[str, float]]:
    """The lines of a losses.jsonl: "iteration" (from 1), "lm loss", "learning-rate", "grad-norm"; or of a validation.jsonl:
    "iteration", "lm loss validation-<name>". A half-written last line is left out. Raises CorruptInput."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [_parsed(line, f"{path} line {number}") for number, line in enumerate(lines[:-1], start=1)]


def _parsed(line: bytes, where: str) -> dict[str, float]:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise CorruptInput(f"{where}: not JSON ({e}).") from e
    if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
        raise CorruptInput(f"{where}: {line[:60]!r} says no iteration. Delete the folder to train again from the start.")
    return row


class LossLog:
    """The file, kept by rank 0 only. What has been sync()ed survives a crash."""

    def __init__(self, path: Path, *, iteration: int, gaps: bool = False) -> None:
        """Continue after `iteration`: lines beyond it are cut off. Raises CorruptInput if lines up to it are missing.

        gaps: they may be, where not every iteration has one, or where they are what another program printed, and who listened
        to it was killed.
        """
        kept = [row for row in read_losses(path) if row["iteration"] <= iteration]
        if not gaps and [row["iteration"] for row in kept] != list(range(1, iteration + 1)):
            raise CorruptInput(
                f"{path} has {len(kept)} of the lines 1 to {iteration}, though the run was saved at iteration {iteration}. "
                "Delete the folder to train again from the start."
            )
        self._path = path
        write_atomic(path, "".join(_line(row) for row in kept))
        self._file: IO[str] = open(path, "a", buffering=1)  # noqa: SIM115 (open as long as the run; read while it goes on)

    def append(self, row: Mapping[str, float]) -> None:
        with storage_errors(f"writing {self._path}"):
            self._file.write(_line(row))

    def sync(self) -> None:
        """Make all lines durable. Raises StorageError."""
        with storage_errors(f"writing {self._path}"):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def _line(row: Mapping[str, float]) -> str:
    return json.dumps(row) + "\n"


class DivergenceGuard:
    """Stops a run whose loss is not finite, or has left its recent level for good."""

    def __init__(self, settings: TrainSpec, name: str, past_losses: list[float]) -> None:
        """past_losses: those of a resumed run's earlier iterations, so that stopping and resuming changes nothing."""
        self._settings, self._name = settings, name
        self._recent: deque[float] = deque(maxlen=settings.loss_spike_window)
        self._spikes = 0
        # All of them: what is a spike follows from the reference, which spikes do not enter, and so from all that came before.
        for loss in past_losses:
            self._see(loss)

    def check(self, iteration: int, loss: float, grad_norm: float) -> None:
        """Raises Diverged, which leaves the last checkpoint as it is."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm}"
            raise Diverged(
                f"run {self._name}: {what} at iteration {iteration}, expected a finite number. The last checkpoint is intact. "
                "Lower the learning rate or the clipping threshold, lengthen the warm-up, or look at the data of this step."
            )
        if not self._see(loss):
            return
        if self._spikes >= self._settings.loss_spike_patience:
            raise Diverged(
                f"run {self._name}: the loss has been above {self._settings.loss_spike_factor} x its recent median "
                f"{statistics.median(self._recent):.4f} for {self._spikes} iterations, to {loss:.4f} at iteration {iteration}. "
                "The last checkpoint is intact. Lower the learning rate, or raise train.loss_spike_factor if this is expected."
            )

    def _see(self, loss: float) -> bool:
        """True if this loss is a spike; it then does not enter the reference."""
        full = len(self._recent) == self._settings.loss_spike_window
        if full and loss > self._settings.loss_spike_factor * statistics.median(self._recent):
            self._spikes += 1
            return True
        self._spikes = 0
        self._recent.append(loss)
        return False
