"""TrainJob: one training run as plain data, written as JSON by whoever wants it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_demix.artifact import read_json
from megatron_demix.errors import ConfigError
from megatron_demix.study.reason import reason
from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec, check_layout


class TrainJob(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Literal["train"] = "train"
    name: str
    seed: int = Field(ge=0)
    model: ModelSpec
    parallel: ParallelSpec = ParallelSpec()
    train: TrainSpec
    train_iters: int = Field(ge=1)
    schedule_iters: int | None = Field(None, ge=1)
    """Iterations that the learning rate's schedule is made for. Default: train_iters. With more, the run ends before it."""
    keep: list[Annotated[int, Field(ge=1)]] = []
    """Iterations whose checkpoints stay, beside the last one's."""
    keep_at_end: int = Field(1, ge=1)
    """Newest checkpoints that a finished run has, beside those of `keep`."""
    override_opt_param_scheduler: bool = False
    """A resumed run may follow the schedule of another length from there on, even if the learning rate jumps."""
    vocab_size: int = Field(ge=2)
    """Number of token ids, before padding."""
    eod_id: int = Field(ge=0)
    blend: list[tuple[Path, Annotated[float, Field(ge=0)]]] = Field(min_length=1)
    """Megatron path prefixes (without .bin/.idx) and their shares of the samples. A share of 0 drops the source."""
    valid: dict[str, Path] = {}
    """Validation prefixes by name; each is logged as `lm loss validation-<name>`."""
    eval_interval: int | None = Field(None, ge=1)
    """Iterations between evaluations on them. Default: at the end only."""
    eval_iters: int = Field(4, ge=1)
    """Global batches of each that are evaluated."""
    init_checkpoint: Path | None = None
    """Weights to start from. Iteration, optimizer and schedule start afresh."""
    work: Path
    """Folder of this run: checkpoints, losses.jsonl, validation.jsonl. Starting again resumes from its newest checkpoint."""
    index_cache: Path
    """Folder for megatron.core's sample indices."""
    tensorboard: Path | None = None
    heartbeat: Path | None = None
    threads_per_rank: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _can_run(self) -> TrainJob:
        if not any(weight > 0 for _, weight in self.blend):
            raise ValueError("blend: every source has weight 0; give at least one a positive weight")
        if self.eod_id >= self.vocab_size:
            raise ValueError(f"eod_id {self.eod_id} is not below vocab_size {self.vocab_size}")
        if self.decay_iters < self.train_iters:
            raise ValueError(f"schedule_iters {self.schedule_iters} is below train_iters {self.train_iters}")
        check_layout(self.model, self.parallel, self.train)
        return self

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each data parallel rank runs in one step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.parallel.data)

    @property
    def decay_iters(self) -> int:
        """The length of the learning rate's schedule."""
        return self.schedule_iters or self.train_iters

    @classmethod
    def read(cls, path: Path) -> TrainJob:
        """The job in a JSON file. Raises ConfigError naming the field, CorruptInput if the file cannot be read."""
        data = read_json(path)
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            problems = "\n".join(f"  {'.'.join(map(str, d['loc'])) or 'job'}: {reason(d)}" for d in e.errors())
            raise ConfigError(f"job {path}:\n{problems}") from e
