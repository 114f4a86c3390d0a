"""Evaluation windows are fixed, cover every token once, and refuse data that cannot be scored."""

import numpy as np
import pytest

from megatron_demix.errors import CorruptInput, IncompatibleInputs
from megatron_demix.evaluate.windows import read_windows


@pytest.fixture()
def prefix(tmp_path):
    """Three documents, tokens 0..29 in order."""
    from megatron_demix.indexed.writer import write_indexed

    lengths = np.array([10, 7, 13])
    write_indexed(tmp_path / "valid", np.arange(30, dtype=np.uint16), lengths)
    return tmp_path / "valid"


def windows(prefix, seq_length=8, num_tokens=100, vocab_size=30):
    bytes_of = np.arange(vocab_size, dtype=np.int32)
    return read_windows("code", [prefix], seq_length=seq_length, num_tokens=num_tokens, token_bytes=bytes_of, vocab_size=vocab_size)


def test_every_target_once(prefix):
    got = windows(prefix)
    assert got.tokens.shape == (3, 9)
    assert got.tokens[:, 1:].ravel().tolist() == list(range(1, 25))
    assert (got.tokens[:, 0] == [0, 8, 16]).all()
    assert got.target_bytes == sum(range(1, 25))
    assert got.num_targets == 24


def test_stops_at_the_tokens_asked_for(prefix):
    assert windows(prefix, num_tokens=16).tokens.shape == (2, 9)
    assert windows(prefix, num_tokens=1).tokens.shape == (1, 9), "never less than one window"


def test_too_little_text(prefix):
    with pytest.raises(CorruptInput, match=r"domain 'code': .*holds 30 tokens, but one evaluation window needs 41"):
        windows(prefix, seq_length=40)


def test_foreign_token_ids(prefix):
    with pytest.raises(IncompatibleInputs, match=r"token id 24 in .*but the tokenizer has 20 ids"):
        windows(prefix, vocab_size=20)
