"""Archives of 4 GiB and more: what their 32-bit fields cannot say."""

import io
import zipfile

import numpy as np
import pytest
import torch
from dist_checkpoints import blob_of

from megatron_demix.checkpoint.archive import read_archive
from megatron_demix.checkpoint.payload import read_payload
from megatron_demix.checkpoint.writer import TensorItem


@pytest.mark.parametrize("limit", [0, 100, 1000])
def test_whatever_is_said_in_64_bits_is_read(monkeypatch, limit):
    """Of which entries and of what, zipfile decides by a limit, here as if it were small."""
    tensor = torch.arange(600, dtype=torch.int16).reshape(20, 30)
    plain = blob_of(tensor)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(plain)) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    wide = np.frombuffer(buffer.getvalue(), np.uint8)
    assert b"PK\6\6" in buffer.getvalue()
    assert {n: (d.tobytes(), crc) for n, (d, crc) in read_archive(wide, "x").items()} == {
        n: (d.tobytes(), crc) for n, (d, crc) in read_archive(plain, "x").items()
    }
    assert read_payload(wide, "x").record.tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("num", [2**32 - 1, 2**32 - 200, 2**32 + 5])
def test_large_tensors_are_written_as_torch_and_zipfile_read_them(tmp_path, num):
    """Zeros, of which a file holds no bytes, between a first and a last element."""
    frame = TensorItem("w", "int8", (num,), (0,), (num,)).frame(0)
    path = tmp_path / "archive"
    with open(path, "wb") as file:
        file.write(frame.head + b"\1")
        file.seek(frame.record_at + num - 1)
        file.write(b"\2" + frame.tail)
    assert path.stat().st_size == frame.length
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == num
        assert archive.open("archive/data/0").read(3) == b"\1\0\0"
    loaded = torch.load(path, mmap=True, weights_only=True)
    ours = read_payload(np.memmap(path, np.uint8, "r"), "x")
    assert ours.shape == loaded.shape == (num,)
    for found in (loaded.numpy(), ours.record):
        assert (found[[0, 1, -2, -1]] == [1, 0, 0, 2]).all()
