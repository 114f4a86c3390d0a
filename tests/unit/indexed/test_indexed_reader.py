"""The .idx reader believes nothing: every way a file can be wrong has its own message."""

import os
import struct

import numpy as np
import pytest
from indexed_data import make_indexed, write_view

from megatron_demix.errors import CorruptInput
from megatron_demix.indexed import reader as reader_module
from megatron_demix.indexed.format import HEADER_BYTES
from megatron_demix.indexed.reader import IndexedReader, read_index
from megatron_demix.indexed.writer import IndexedWriter

LENGTHS = [5, 0, 7, 1]


@pytest.fixture
def prefix(tmp_path):
    return make_indexed(tmp_path / "data", LENGTHS)


def test_reads_what_was_written(prefix):
    index = read_index(prefix)
    assert index.lengths.tolist() == LENGTHS
    assert index.pointers.tolist() == [0, 10, 10, 24]
    assert index.documents.tolist() == [0, 1, 2, 3, 4]
    assert (index.num_tokens, index.num_documents, index.num_sequences, index.dtype) == (13, 4, 4, np.uint16)
    assert not index.has_several_sequences
    assert not index.is_view


def test_tokens_of_documents(prefix):
    reader = IndexedReader(prefix)
    everything = np.fromfile(f"{prefix}.bin", "<u2")
    assert reader.tokens(2).tolist() == everything[5:12].tolist()
    assert reader.tokens(1).tolist() == []
    with pytest.raises(IndexError, match="document 4 of 4"):
        reader.tokens(4)
    with pytest.raises(IndexError, match="sequence -1 of 4"):
        reader.sequence(-1)


def test_sentence_split_documents(tmp_path):
    with IndexedWriter(tmp_path / "s", np.dtype("<u2"), sentences=True) as writer:
        writer.add(np.arange(10), np.array([2, 3, 5]), sequences_a_document=np.array([2, 0, 1]))
    reader = IndexedReader(tmp_path / "s")
    assert reader.index.has_several_sequences
    assert [reader.tokens(d).tolist() for d in range(3)] == [[0, 1, 2, 3, 4], [], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("chunk", [2, 1 << 20])
def test_a_document_without_a_sequence_is_not_split(tmp_path, monkeypatch, chunk):
    """Megatron's preprocess_data.py makes one of an empty text."""
    monkeypatch.setattr(reader_module, "_CHUNK", chunk)
    for groups, split in (([0, 1, 1, 0, 0, 1, 1, 0], False), ([1, 0, 0, 1, 2], True), ([1, 2, 1], True), ([0, 0], False)):
        with IndexedWriter(tmp_path / "s", np.dtype("<u2"), sentences=True) as writer:
            writer.add(np.arange(sum(groups)), np.ones(sum(groups), int), sequences_a_document=np.array(groups))
        assert read_index(tmp_path / "s").has_several_sequences == split


def test_a_view_knows_that_it_is_one(prefix, tmp_path):
    index = read_index(prefix)
    (tmp_path / "view.bin").write_bytes((tmp_path / "data.bin").read_bytes())
    write_view(tmp_path / "view.idx", index.dtype, index.lengths[[2, 0, 2]], index.pointers[[2, 0, 2]])
    view, whole = IndexedReader(tmp_path / "view"), IndexedReader(prefix)
    assert view.index.is_view
    assert [view.tokens(i).tolist() for i in range(3)] == [whole.tokens(i).tolist() for i in (2, 0, 2)]


def test_an_index_keeps_no_descriptor(prefix):
    """Else a pool of a thousand prefixes is more than a process may have open."""
    before = os.listdir("/proc/self/fd")
    index, reader = read_index(prefix), IndexedReader(prefix)
    assert os.listdir("/proc/self/fd") == before
    assert index.num_documents == reader.num_documents == 4


def test_an_index_that_becomes_shorter_while_it_is_read(prefix):
    reader = IndexedReader(prefix)
    os.truncate(f"{prefix}.idx", 0)
    for use in (lambda: reader.sequence(1), lambda: reader.tokens(1), reader.index.check_still_there):
        with pytest.raises(CorruptInput, match=r"data\.idx became shorter, or its disk failed, while it was read"):
            use()


def test_tokens_that_become_fewer_while_they_are_read(prefix):
    reader = IndexedReader(prefix)
    os.truncate(f"{prefix}.bin", 0)
    assert not reader.sequence(2).any()
    with pytest.raises(CorruptInput, match=r"data\.bin became shorter, or its disk failed, while it was read"):
        reader.check_still_there()


def test_empty_data_set(tmp_path):
    with IndexedWriter(tmp_path / "none", np.dtype("<i4")):
        pass
    assert read_index(tmp_path / "none").num_documents == 0
    assert IndexedReader(tmp_path / "none").num_documents == 0


def damage(data: bytearray, at: int, form: str, value: int) -> bytearray:
    struct.pack_into(form, data, at, value)
    return data


S = len(LENGTHS)
POINTERS, DOCUMENTS = HEADER_BYTES + 4 * S, HEADER_BYTES + 12 * S
HOSTILE = {
    "no bytes": (lambda d: b"", "0 bytes, shorter than the header of 34"),
    "half a header": (lambda d: d[:20], "20 bytes, shorter than the header of 34"),
    "foreign": (lambda d: b"PK\x03\x04" + d[4:], "does not begin with Megatron's magic bytes"),
    "version": (lambda d: damage(d, 9, "<Q", 2), "version 2, expected 1"),
    "dtype 0": (lambda d: damage(d, 17, "<B", 0), "dtype code 0, expected 1 to 8"),
    "dtype 9": (lambda d: damage(d, 17, "<B", 9), "dtype code 9, expected 1 to 8"),
    "truncated": (lambda d: d[:-1], "121 bytes, but its header asks for 122 bytes: it is truncated"),
    "appended": (lambda d: d + b"trash", "127 bytes, but its header asks for 122 bytes"),
    "2^63 sequences": (lambda d: damage(d, 18, "<Q", 2**63), "its header asks for more than it holds"),
    "wrapping counts": (lambda d: damage(d, 18, "<Q", 2**64 // 12 + 1), "its header asks for more than it holds"),
    "no boundaries": (lambda d: damage(d, 26, "<Q", 0), "its header asks for more than it holds"),
    "negative length": (lambda d: damage(d, HEADER_BYTES + 8, "<i", -3), "sequence 2 has length -3, expected >= 0"),
    "pointer past the end": (
        lambda d: damage(d, POINTERS + 16, "<q", 13),
        "sequence 2 begins at byte 13 of the .bin, but the last",
    ),
    "negative pointer": (lambda d: damage(d, POINTERS, "<q", -2), "sequence 0 begins at byte -2"),
    "overflowing pointer": (lambda d: damage(d, POINTERS, "<q", 2**63 - 1), "sequence 0 begins at byte 9223372036854775807"),
    "length past the end": (lambda d: damage(d, HEADER_BYTES, "<i", 2**31 - 1), "sequence 0 begins at byte 0 of the .bin, but"),
    "first document": (lambda d: damage(d, DOCUMENTS, "<q", 1), "the first document begins at sequence 1, expected 0"),
    "documents go back": (lambda d: damage(d, DOCUMENTS + 8, "<q", 9), "document boundary 2 is 2, before the one it follows"),
    "last document": (lambda d: damage(d, DOCUMENTS + 8 * S, "<q", 7), "the last document ends at sequence 7, expected 4"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_index(prefix, case):
    change, message = HOSTILE[case]
    path = prefix.with_suffix(".idx")
    path.write_bytes(bytes(change(bytearray(path.read_bytes()))))
    with pytest.raises(CorruptInput, match=r"data\.idx") as raised:
        read_index(prefix)
    assert message in str(raised.value)


def test_truncated_bin(prefix):
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptInput, match=r"the \.bin has 25 bytes: it is truncated, or belongs to another \.idx"):
        read_index(prefix)


def test_absent_files(prefix, tmp_path):
    with pytest.raises(CorruptInput, match=r"data\.idx\.idx does not exist.*Did you mean .*data\?"):
        read_index(f"{prefix}.idx")
    (tmp_path / "data.bin").unlink()
    with pytest.raises(CorruptInput, match=r"data\.bin does not exist"):
        read_index(prefix)
