"""Mutated checkpoints: every reader answers with a value or with CorruptInput, whatever the bytes, and never runs them.

DEMIX_FUZZ=N sets the mutations of each file (400 by default; a long run takes as many as one likes).
"""

import io
import os
import random
from collections import Counter

import numpy as np
import pytest
import torch
from dist_checkpoints import parallel_cuts, small_model, write_checkpoint

from megatron_demix.checkpoint import common_state as common_state_module
from megatron_demix.checkpoint import payload as payload_module
from megatron_demix.checkpoint.common_state import merged_common_state, read_common_state
from megatron_demix.checkpoint.metadata import read_metadata
from megatron_demix.checkpoint.payload import read_payload
from megatron_demix.checkpoint.pickles import write_pickle
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import CorruptInput

NUM = int(os.environ.get("DEMIX_FUZZ", "400"))


def mutations(seed: bytes, num: int):
    """The seed with up to six bytes changed, cut out, repeated or put in, or cut short; numbers at the edges of their types."""
    draw = random.Random(len(seed))
    edges = [
        b"\x00",
        b"\xff",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x80",
        b"\xff" * 8,
        b"\x01" + b"\x00" * 7,
        b"PK\x05\x06",
        b"c",
        b"R",
        b"b",
    ]
    for _ in range(num):
        data = bytearray(seed)
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(data) + 1)
            kind = draw.randrange(5)
            if kind == 0 and at < len(data):
                data[at] = draw.randrange(256)
            elif kind == 1:
                del data[at : at + draw.randint(1, 12)]
            elif kind == 2:
                data[at : at + draw.randint(0, 8)] = draw.choice(edges)
            elif kind == 3:
                data[at:at] = data[draw.randrange(len(data) + 1) :][: draw.randint(1, 30)]
            elif draw.random() < 0.1:
                del data[at:]
        yield bytes(data)


def survive(read, seed: bytes) -> Counter:
    outcomes: Counter = Counter()
    for data in mutations(seed, NUM):
        try:
            read(data)
            outcomes["read"] += 1
        except CorruptInput:
            outcomes["refused"] += 1
    assert outcomes["refused"] > NUM // 10
    return outcomes


@pytest.fixture
def no_execution(monkeypatch):
    """Any attempt to run a command or to import through a pickle fails the test, not only the read.

    Checksums are not compared, so that mutations reach what comes after.
    """

    def forbidden(*arguments):
        raise SystemExit(f"a mutated checkpoint ran something: {arguments}")

    for module in (payload_module, common_state_module):
        monkeypatch.setattr(module, "check_entry", lambda data, *_: data)
    for name in ("system", "popen", "execv", "posix_spawn"):
        monkeypatch.setattr(os, name, forbidden)


def test_metadata(tmp_path, no_execution):
    write_checkpoint(tmp_path, small_model(0), parallel_cuts(2), objects={"x._extra_state/shard_0_1": b"x"})

    def read(data):
        (tmp_path / ".metadata").write_bytes(data)
        read_metadata(tmp_path)

    survive(read, (tmp_path / ".metadata").read_bytes())


@pytest.mark.parametrize("tensor", [torch.arange(6.0).reshape(2, 3), torch.zeros(3, dtype=torch.uint16)])
def test_payload(no_execution, tensor):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)

    def read(data):
        payload = read_payload(np.frombuffer(data, np.uint8), "mutated")
        last = sum((n - 1) * s for n, s in zip(payload.shape, payload.strides, strict=True))
        item = payload.record.itemsize * (4 if payload.dtype == "float32" else 1)
        assert not all(payload.shape) or payload.offset_bytes + last * item < max(1, payload.record.nbytes)

    survive(read, buffer.getvalue())


def test_common_state(tmp_path, no_execution):
    write_checkpoint(tmp_path, small_model(0))
    checkpoint = Checkpoint(tmp_path)

    def read(data):
        (tmp_path / "common.pt").write_bytes(data)
        merged, _ = merged_common_state(read_common_state(checkpoint), 0)
        write_pickle(merged)

    survive(read, (tmp_path / "common.pt").read_bytes())
