"""Names, types and the header of the format; see the package's docstring for the layout."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from megatron_demix.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34

# By dtype code; code 0 is not used.
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def bin_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.idx")


def header(dtype: np.dtype, sequences: int, boundaries: int) -> bytes:
    return MAGIC + struct.pack("<QBQQ", VERSION, CODES[np.dtype(dtype)], sequences, boundaries)


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron chooses for a vocabulary: uint16 below 65500 ids, int32 from there. Raises ConfigError above int32."""
    if not 0 < vocab_size <= 2**31:
        raise ConfigError(f"vocabulary of {vocab_size} ids: expected 1 to 2^31, the most an int32 token holds.")
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")
