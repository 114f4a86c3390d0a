"""The same bytes as Megatron's own builder, and readable by its own reader."""

import numpy as np
import pytest
import torch
from indexed_data import make_indexed

from megatron_demix.errors import IncompatibleInputs, StorageError
from megatron_demix.indexed.format import DTYPES, token_dtype
from megatron_demix.indexed.reader import read_index
from megatron_demix.indexed.writer import IndexedWriter


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 200000])
def test_identical_to_the_stock_builder(tmp_path, vocab_size):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = token_dtype(vocab_size)
    assert dtype == DType.optimal_dtype(vocab_size)
    rng = np.random.default_rng(vocab_size)
    documents = [rng.integers(0, vocab_size, n) for n in (3, 0, 17, 1, 400)]
    builder = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=dtype.type)
    for document in documents:
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "stock.idx"))
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        writer.add(np.concatenate(documents[:2]), np.array([3, 0]))
        writer.add(np.concatenate(documents[2:]), np.array([17, 1, 400]))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"stock{suffix}").read_bytes()


def test_identical_to_the_stock_builder_sentences_and_modes(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=np.uint16)
    builder.add_document(np.arange(10), [2, 3, 5])
    builder.add_document(np.arange(4), [4])
    builder.finalize(str(tmp_path / "stock.idx"))
    with IndexedWriter(tmp_path / "ours", np.dtype("<u2"), sentences=True) as writer:
        writer.add(np.r_[np.arange(10), np.arange(4)], np.array([2, 3, 5, 4]), sequences_a_document=np.array([3, 1]))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "stock.idx").read_bytes()
    multimodal = IndexedDatasetBuilder(str(tmp_path / "modes.bin"), dtype=np.int32, multimodal=True)
    multimodal.add_item(torch.arange(3), mode=1)
    multimodal.end_document()
    multimodal.finalize(str(tmp_path / "modes.idx"))
    assert read_index(tmp_path / "modes").lengths.tolist() == [3]


def test_stock_reader_reads_ours(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = make_indexed(tmp_path / "data", [4, 9, 1], vocab_size=100000)
    stock, everything = IndexedDataset(str(prefix)), np.fromfile(f"{prefix}.bin", "<i4")
    assert np.concatenate([stock[i] for i in range(3)]).tolist() == everything.tolist()
    assert stock.document_indices.tolist() == [0, 1, 2, 3]


def test_dtype_codes_are_megatrons():
    from megatron.core.datasets.indexed_dataset import DType

    assert {d.value: np.dtype(d.name) for d in DType} == DTYPES


def test_ids_that_do_not_fit(tmp_path):
    with (
        pytest.raises(IncompatibleInputs, match="token ids 1 to 70000 do not fit uint16"),
        IndexedWriter(tmp_path / "x", np.dtype("<u2")) as w,
    ):
        w.add(np.array([1, 70000]), np.array([2]))
    assert not (tmp_path / "x.idx").exists()
    with (
        pytest.raises(ValueError, match="3 tokens, but the lengths sum to 2"),
        IndexedWriter(tmp_path / "y", np.dtype("<u2")) as w,
    ):
        w.add(np.arange(3), np.array([2]))


@pytest.mark.parametrize(("sentences", "groups"), [(True, [2]), (False, [2, 1])])
def test_sequences_that_cannot_be_grouped(tmp_path, sentences, groups):
    """Into documents of fewer than there are, or of several where the file was opened for documents of one."""
    with (
        pytest.raises(ValueError, match=rf"3 sequences cannot be grouped by {sum(groups)}"),
        IndexedWriter(tmp_path / "x", np.dtype("<u2"), sentences=sentences) as w,
    ):
        w.add(np.arange(6), np.array([2, 2, 2]), sequences_a_document=np.array(groups))
    assert not (tmp_path / "x.idx").exists()


def test_what_was_written_before_and_is_gone(tmp_path):
    """As after a power cut. Going on would leave a hole in the data."""
    killed = IndexedWriter(tmp_path / "x", np.dtype("<u2"))
    killed.add(np.arange(6), np.array([6]))
    written = killed.checkpoint()
    with open(tmp_path / "x.bin", "r+b") as file:
        file.truncate(4)
    with pytest.raises(ValueError, match=r"x\.bin has 4 bytes, expected 12 from before"):
        IndexedWriter(tmp_path / "x", np.dtype("<u2"), resume=written)
    with (
        pytest.raises(ValueError, match=r"x\.bin has 4 bytes, expected 12"),
        IndexedWriter(tmp_path / "all", np.dtype("<u2")) as writer,
    ):
        writer.append(tmp_path / "x", written)


def test_a_document_longer_than_the_format_holds(tmp_path):
    with (
        pytest.raises(IncompatibleInputs, match=r"a document of 2147483648 tokens; the format holds 2\^31 - 1 at most"),
        IndexedWriter(tmp_path / "x", np.dtype("<u2")) as w,
    ):
        w.add(np.broadcast_to(np.uint16(1), (2**31,)), np.array([2**31]))
    assert not (tmp_path / "x.idx").exists()


def test_full_disk(tmp_path):
    (tmp_path / "x.bin").symlink_to("/dev/full")
    full = pytest.raises(StorageError, match=r"writing .*x\.bin: No space left on device")
    with full, IndexedWriter(tmp_path / "x", np.dtype("<u2")) as writer:
        writer.add(np.zeros(1 << 20, np.int64), np.array([1 << 20]))
    (tmp_path / "y.idx").symlink_to("/dev/full")
    with (
        pytest.raises(StorageError, match=r"writing .*y\.idx: No space left on device"),
        IndexedWriter(tmp_path / "y", np.dtype("<u2")) as w,
    ):
        w.add(np.arange(3), np.array([3]))
