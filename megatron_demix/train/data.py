"""Training samples: a blend of Megatron data sets through megatron.core's own builder, in an order that never depends on
the layout.

It follows from the seed and from the number of samples asked for, train_iters x global_batch_size: megatron.core shuffles a
source over all the epochs it needs. While none is read for more than one, a longer run begins with the samples of a shorter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_demix.artifact import fingerprint, hash_file
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs, storage_errors
from megatron_demix.locks import open_lock, take_lock
from megatron_demix.train.derived import blend_surplus
from megatron_demix.train.job import TrainJob

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Vocabulary:
    """The part of a tokenizer that megatron.core's data sets ask for.

    sources: names the content of the .idx files. Without it megatron.core would take indices of what lay there before.
    """

    eod: int
    sources: str
    vocab_size: None = None  # known, it would override the dtype that the .idx itself states

    @property
    def unique_identifiers(self) -> dict[str, int | str]:
        return {"eod": self.eod, "sources": self.sources}


def training_data(job: TrainJob) -> torch.utils.data.Dataset:
    """At least train_iters x global_batch_size samples of the blend. All ranks call it. Raises ConfigError, CorruptInput,
    StorageError."""
    sources = [(prefix, weight) for prefix, weight in job.blend if weight > 0]
    dropped = [str(prefix) for prefix, weight in job.blend if weight == 0]
    if dropped and torch.distributed.get_rank() == 0:
        logger.warning("sources with weight 0 are left out: %s", ", ".join(dropped))
    return _build(job, sources, job.train_iters * job.train.global_batch_size)


def validation_data(job: TrainJob) -> dict[str, torch.utils.data.Dataset]:
    """At least eval_iters x global_batch_size samples of every validation set, by name: the same ones at each evaluation."""
    num_samples = job.eval_iters * job.train.global_batch_size
    return {name: _build(job, [(prefix, 1.0)], num_samples) for name, prefix in sorted(job.valid.items())}


def _build(job: TrainJob, sources: Sequence[tuple[Path, float]], num_samples: int) -> torch.utils.data.Dataset:
    for prefix, _ in sources:
        for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
            if not path.is_file():
                raise ConfigError(f"run {job.name}: {path} is missing; the blend names the prefix {prefix}.")
            if path.stat().st_size == 0:
                raise CorruptInput(f"run {job.name}: {path} is empty, expected tokens. Prepare {prefix} again or leave it out.")
    prefixes, weights = [str(prefix) for prefix, _ in sources], [weight for _, weight in sources]
    config = GPTDatasetConfig(
        random_seed=job.seed,
        sequence_length=job.train.seq_length,
        blend_per_split=[(prefixes, weights if len(weights) > 1 else None), None, None],
        path_to_cache=str(job.index_cache),
        tokenizer=_Vocabulary(job.eod_id, _content(prefixes)),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # causal masking is part of the layer spec
        mid_level_dataset_surplus=blend_surplus(len(weights), num_samples),
    )
    with _building_alone(job.index_cache), storage_errors(f"writing sample indices into {job.index_cache}"):
        return BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()[0]


def _content(prefixes: Sequence[str]) -> str:
    """Names what the .idx files hold, as rank 0 reads them."""
    found = ""
    if torch.distributed.get_rank() == 0:
        found = fingerprint({prefix: hash_file(Path(f"{prefix}.idx")) for prefix in prefixes})
    names = [found]
    torch.distributed.broadcast_object_list(names)
    return names[0]


@contextmanager
def _building_alone(cache: Path) -> Iterator[None]:
    """Rank 0 holds a lock on the cache while it builds: megatron.core would read another run's half-written index."""
    if torch.distributed.get_rank() != 0:
        yield
        return
    with storage_errors(f"making {cache}"):
        cache.mkdir(parents=True, exist_ok=True)
    with open_lock(cache / ".lock") as file:
        take_lock(file, f"another run that builds indices in {cache}")
        yield


def micro_batches(
    dataset: torch.utils.data.Dataset, first_sample: int, job: TrainJob, device: torch.device | int
) -> Iterator[Batch]:
    """This rank's part of the global batch of samples [first_sample, first_sample + global_batch_size), by micro-batch.

    Yields tokens, labels, position_ids (int64) and loss_mask (float32), each [micro_batch_size, seq_length].
    """
    size = job.train.micro_batch_size
    rank, stride = parallel_state.get_data_parallel_rank(), size * parallel_state.get_data_parallel_world_size()
    for start in range(first_sample + rank * size, first_sample + job.train.global_batch_size, stride):
        samples = [dataset[i] for i in range(start, start + size)]
        batch = {name: torch.stack([s[name] for s in samples]) for name in ("tokens", "labels", "position_ids", "loss_mask")}
        largest = int(batch["tokens"].max())
        if largest >= job.vocab_size:
            raise IncompatibleInputs(
                f"run {job.name}: samples {start} to {start + size - 1} hold token id {largest}, but the vocabulary has "
                f"{job.vocab_size}. Was the data prepared with another tokenizer?"
            )
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def part_of_sequences(batch: Batch, rank: int, size: int) -> Batch:
    """What context parallel rank `rank` of `size` has of each sequence, as Transformer Engine's attention expects it: of
    2 x size equal parts the one at place `rank` from the front and the one at that place from the back. Causal attention is
    then as much work on every rank.

    megatron.core has this, too, but asks for other arguments from version to version.
    """
    parts = {name: tensor.chunk(2 * size, dim=1) for name, tensor in batch.items()}
    return {name: torch.cat([cut[rank], cut[-1 - rank]], dim=1) for name, cut in parts.items()}
