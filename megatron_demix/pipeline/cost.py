"""What stages cost: models trained and scored, tokens, arithmetic and disk. It follows from the settings, so it is known before
anything runs; what tasks cost is not, and is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_demix.errors import DemixError
from megatron_demix.pipeline.data_stages import num_ids
from megatron_demix.pipeline.foundation import Foundation
from megatron_demix.pipeline.stage import Stage
from megatron_demix.train.derived import checkpoint_bytes, flops_per_token, padded_vocab_size

H100_FLOPS = 989e12
"""Dense bfloat16 FLOP/s of an H100, from NVIDIA's data sheet: the unit of `Cost.gpu_hours`."""
UTILISATION = 0.4
"""How much of that a well-set training run of a dense model reaches."""


@dataclass(frozen=True)
class Cost:
    """Of a stage that trains or scores, or of all those of one kind that do.

    kind: the first word of a stage's name. models, tokens: how many, and each model's, summed over models. flop:
    multiplications and additions. checkpoint_bytes: what stays on disk, optimizer included; runs hold more while they go on.
    """

    kind: str
    does: Literal["trains", "scores"]
    models: int
    tokens: int
    flop: float
    checkpoint_bytes: int

    @property
    def models_in_words(self) -> str:
        return f"{self.models} {'trained' if self.does == 'trains' else 'scored'}"

    @property
    def gpu_hours(self) -> float:
        return self.flop / (H100_FLOPS * UTILISATION) / 3600


def costs(foundation: Foundation, stages: Sequence[Stage]) -> dict[Stage, Cost]:
    """Of each stage that trains, or scores on text. Empty where the size of the vocabulary is not known."""
    study = foundation.study
    if (rows := _rows_of_embedding(foundation)) is None:
        return {}
    trained_flop = flops_per_token(study.model, study.train.seq_length, rows)
    flop = {"trains": trained_flop, "scores": trained_flop / 3}  # forward once; backward is twice as much
    saved = checkpoint_bytes(study.model, study.train, rows)
    found = {}
    for stage in stages:
        if (load := stage.load()) and (tokens := load.models * load.tokens):
            found[stage] = Cost(
                stage.kind, load.does, load.models, tokens, tokens * flop[load.does], load.models * load.checkpoints * saved
            )
    return found


def by_kind(of_stages: Iterable[Cost]) -> list[Cost]:
    """The costs of stages of one kind that do the same, summed; in the order of the first of each."""
    groups: dict[tuple[str, str], list[Cost]] = {}
    for cost in of_stages:
        groups.setdefault((cost.kind, cost.does), []).append(cost)
    return [
        replace(
            group[0],
            models=sum(cost.models for cost in group),
            tokens=sum(cost.tokens for cost in group),
            flop=math.fsum(cost.flop for cost in group),
            checkpoint_bytes=sum(cost.checkpoint_bytes for cost in group),
        )
        for group in groups.values()
    ]


def _rows_of_embedding(foundation: Foundation) -> int | None:
    """Those that the model says, else by the ids of the tokenizer; None where that cannot be read."""
    model = foundation.study.model
    if model.padded_vocab_size is not None:
        return model.padded_vocab_size
    try:
        ids = num_ids(foundation.study, foundation.tokenizer)
    except DemixError:  # it says so when the tokenizer is made
        return None
    return padded_vocab_size(model, foundation.study.parallel, ids)
