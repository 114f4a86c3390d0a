"""Any box of a tensor, whatever the chunks that hold it."""

import pytest
import torch
from dist_checkpoints import bits, edited_metadata, parallel_cuts, small_model, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_demix.checkpoint.elements import ElementReader
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import CorruptInput, IncompatibleInputs

TENSORS = small_model(0) | {"scale": torch.tensor(1.5), "wide": torch.arange(12.0).reshape(3, 4)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    stored = {"transposed": ["decoder.layers.mlp.linear_fc1.weight"], "spread": ["embedding.word_embeddings.weight", "wide"]}
    return Checkpoint(write_checkpoint(folder, TENSORS, parallel_cuts(4), num_files=3, odd=True, **stored))


@settings(max_examples=60)
@given(st.sampled_from(sorted(TENSORS)), st.data())
def test_every_box_holds_the_elements_that_lie_there(checkpoint, key, data):
    info = checkpoint.model_tensors[key]
    lo = [data.draw(st.integers(0, n)) for n in info.shape]
    hi = [data.draw(st.integers(a, n)) for a, n in zip(lo, info.shape, strict=True)]
    found = ElementReader(checkpoint).read(info, lo, [b - a for a, b in zip(lo, hi, strict=True)])
    assert found.tobytes() == bits(TENSORS[key][tuple(map(slice, lo, hi))])


def test_elements_that_no_chunk_holds(tmp_path):
    folder = write_checkpoint(tmp_path, small_model(0), parallel_cuts(2))
    key = "embedding.word_embeddings.weight"
    edited_metadata(folder, lambda m: m.state_dict_metadata[key].chunks.pop())
    checkpoint = Checkpoint(folder)
    info = checkpoint.model_tensors[key]
    reader = ElementReader(checkpoint)
    assert reader.read(info, (0, 0), (48, 8)).shape == (48, 8)
    with pytest.raises(CorruptInput, match=rf"16 of 32 elements of '{key}' at \(46, 0\) are in no chunk"):
        reader.read(info, (46, 0), (4, 8))


def test_chunks_are_compared_with_their_checksums(tmp_path):
    tensors = small_model(0)
    folder = write_checkpoint(tmp_path, tensors, parallel_cuts(2))
    key = "embedding.word_embeddings.weight"
    file = folder / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[data.find(bits(tensors[key][48:])) + 5] ^= 1
    file.write_bytes(data)
    checkpoint = Checkpoint(folder)
    reader, info = ElementReader(checkpoint), checkpoint.model_tensors[key]
    assert reader.read(info, (0, 0), (48, 8)).tobytes() == bits(tensors[key][:48])
    for _ in range(2):
        with pytest.raises(CorruptInput, match=rf"'{key}' at \(48, 0\)\): its bytes differ from their checksum"):
            reader.read(info, (90, 0), (1, 1))


def test_types_that_are_no_weights_are_refused(tmp_path):
    checkpoint = Checkpoint(write_checkpoint(tmp_path, {"w": torch.zeros(2, dtype=torch.complex64)}))
    with pytest.raises(IncompatibleInputs, match="'w' is complex64, expected one of float32"):
        ElementReader(checkpoint).read(checkpoint.model_tensors["w"], (0,), (2,))
