"""The identity of a checkpoint's weights, by which stages and resumed runs know them again."""

from __future__ import annotations

from megatron_demix.artifact import fingerprint
from megatron_demix.checkpoint.reader import Checkpoint


def weights_digest(checkpoint: Checkpoint) -> str:
    """Names the model's weights, wherever they lie. checkpoint: opened without read_ahead.

    `.metadata` is the same for all checkpoints of one shape, and shards are too large to be read for this: it is the CRCs which
    their archives promise that tell weights apart. Raises as Checkpoint does.
    """
    tensors = checkpoint.model_tensors
    checkpoint.touch_frames(chunk for info in tensors.values() for chunk in info.chunks)
    chunks = [
        [key, info.dtype, info.shape, chunk.offset, chunk.shape, checkpoint.payload(info, chunk).crc]
        for key, info in sorted(tensors.items())
        for chunk in info.chunks
    ]
    checkpoint.check_still_there()
    return fingerprint(chunks)
