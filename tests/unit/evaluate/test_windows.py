"""Evaluation windows are fixed, cover every token once, and refuse data that cannot be scored."""

import numpy as np
import pytest

from megatron_demix.errors import CorruptInput, IncompatibleInputs
from megatron_demix.evaluate.windows import read_windows
from megatron_demix.indexed.writer import IndexedWriter


@pytest.fixture
def prefixes(tmp_path):
    """Two data sets with documents of 10, 7 and 8 tokens: ids 0..24 in order."""
    for name, first, lengths in (("a", 0, [10, 7]), ("b", 17, [8])):
        with IndexedWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            writer.add(np.arange(first, first + sum(lengths), dtype=np.uint16), np.array(lengths))
    return [tmp_path / "a", tmp_path / "b"]


def windows(prefixes, seq_length=8, num_tokens=100, vocab_size=30):
    bytes_of = np.arange(vocab_size, dtype=np.int32)
    return read_windows(
        "code", prefixes, seq_length=seq_length, num_tokens=num_tokens, token_bytes=bytes_of, vocab_size=vocab_size
    )


def test_a_small_split_is_scored_once_over(prefixes):
    got = windows(prefixes)
    assert got.tokens.shape == (3, 9)
    assert got.tokens[:, 1:].ravel().tolist() == list(range(1, 25))
    assert got.target_bytes == sum(range(1, 25))
    assert got.num_targets == 24


def test_few_windows_are_spread_over_all_documents(prefixes):
    assert windows(prefixes, num_tokens=16).tokens[:, 0].tolist() == [0, 16]
    assert windows(prefixes, num_tokens=1).tokens.tolist() == [list(range(9))], "never less than one window"
    assert windows(prefixes, seq_length=3, num_tokens=9).tokens[:, 0].tolist() == [0, 10, 21]


def test_too_little_text(prefixes):
    with pytest.raises(CorruptInput, match=r"domain 'code': .*holds 25 tokens, but one evaluation window needs 26"):
        windows(prefixes, seq_length=25)


def test_foreign_token_ids(prefixes):
    with pytest.raises(IncompatibleInputs, match=r"token id 24 in .*but the tokenizer has 24 ids"):
        windows(prefixes, vocab_size=24)
