"""The zip archives torch.save writes: entries stored uncompressed, described by the central directory.

Local headers may carry zeros for CRC and size, and the place of a record moves with torch's version, so only the central
directory counts. Writing puts the one large record at an aligned place, as torch does, and leaves its CRC to be filled in.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from megatron_demix.errors import CorruptInput
from megatron_demix.native import crc32

_Data = TypeVar("_Data", bytes, np.ndarray)

_LOCAL, _CENTRAL, _END, _END64, _LOCATOR64 = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
_FULL32 = 0xFFFFFFFF


def read_archive(blob: np.ndarray, what: object) -> dict[str, tuple[np.ndarray, int | None]]:
    """name -> (bytes, CRC-32) of a zip whose entries are stored uncompressed. Raises CorruptInput naming `what`.

    The CRCs are None where torch was told not to compute any (torch.serialization.set_crc32_options): it then writes 0 for all.
    """
    try:
        entries = _read(blob)
        known = any(crc for _, crc in entries.values())
        return {name: (data, crc if known else None) for name, (data, crc) in entries.items()}
    except (struct.error, UnicodeDecodeError, _BadZip) as e:
        raise CorruptInput(f"{what}: not a whole torch.save archive ({e}); the file is truncated or damaged.") from e


def check_archive(blob: np.ndarray, what: str) -> None:
    """Compare every entry with its CRC-32, where the bytes are an archive at all. Raises CorruptInput naming `what`."""
    # One damaged byte cannot hide both that it begins and that it ends as an archive.
    if blob[:4].tobytes() == _LOCAL or blob[max(0, blob.nbytes - 22) :][:4].tobytes() == _END:
        for name, (data, crc) in read_archive(blob, what).items():
            check_entry(data, crc, name, what)


def check_entry(data: _Data, crc: int | None, name: str, what: object) -> _Data:
    """The data. Raises CorruptInput naming `what` if it does not have this CRC-32 (None: any)."""
    if crc is not None and crc32(data) != crc:
        raise CorruptInput(f"{what}: the bytes of {name} differ from their checksum. Copy or save the checkpoint again.")
    return data


class _BadZip(Exception):
    pass


# Of an entry's description in the directory, and of what stands before its bytes.
_DESCRIBED, _BEFORE = struct.Struct("<4s6xH4xIIIHHH8xI"), struct.Struct("<4s22xHH")


def _read(blob: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    data, size = blob.data, blob.nbytes
    end = size - 22
    if _bytes(data, end, 4) != _END:  # a comment follows it
        tail_at = max(0, end - 0xFFFF)
        end = tail_at + bytes(data[tail_at:]).rfind(_END)
        if end < tail_at:
            raise _BadZip("its end record is missing")
    count, directory_bytes, directory_at = struct.unpack("<10xHII2x", _bytes(data, end, 22))
    if end >= 20 and _bytes(data, end - 20, 4) == _LOCATOR64:
        (end64,) = struct.unpack("<8xQ4x", _bytes(data, end - 20, 20))
        if _bytes(data, end64, 4) != _END64:
            raise _BadZip("its zip64 end record is missing")
        count, directory_bytes, directory_at = struct.unpack("<32xQQQ", _bytes(data, end64, 56))
    directory = _bytes(data, directory_at, directory_bytes)
    entries, at = {}, 0
    for _ in range(count):
        signature, method, crc, packed, plain, name_bytes, extra_bytes, comment_bytes, local = _DESCRIBED.unpack_from(
            directory, at
        )
        if signature != _CENTRAL:
            raise _BadZip("its directory is damaged")
        after = at + 46 + name_bytes
        name = directory[at + 46 : after].decode()
        at = after + extra_bytes + comment_bytes
        if extra_bytes:
            packed, plain, local = _widened(directory[after : after + extra_bytes], packed, plain, local)
        if method or packed != plain:
            raise _BadZip(f"{name} is compressed")
        signature, local_name_bytes, local_extra_bytes = _BEFORE.unpack_from(data, local)
        if signature != _LOCAL:
            raise _BadZip(f"{name} has no local header")
        start = local + 30 + local_name_bytes + local_extra_bytes
        if start + plain > size:
            raise _BadZip(f"{name} leaves the archive")
        entries[name] = (blob[start : start + plain], crc)
    return entries


def _bytes(data: memoryview, at: int, n: int) -> bytes:
    if at < 0 or at + n > data.nbytes:
        raise _BadZip("a header lies outside of it")
    return bytes(data[at : at + n])


def _widened(extra: bytes, packed: int, plain: int, local: int) -> tuple[int, int, int]:
    """The zip64 extra field replaces the 32-bit values that are full, in this order: plain, packed, local."""
    at = 0
    while at + 4 <= len(extra):
        kind, n = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = at + 4
            if plain == _FULL32:
                (plain,), field = struct.unpack_from("<Q", extra, field), field + 8
            if packed == _FULL32:
                (packed,), field = struct.unpack_from("<Q", extra, field), field + 8
            if local == _FULL32:
                (local,) = struct.unpack_from("<Q", extra, field)
        at += 4 + n
    return packed, plain, local


# --- writing --------------------------------------------------------------------------------------------------------

_ALIGNMENT = 4096
_ALIGNED_FROM = 64 << 10  # smaller records are packed at 64 bytes: padding them would cost more than it gains
_DATE = (0, 0x21)  # 1980-01-01 00:00, the zip epoch: archives do not depend on when they were written


@dataclass(frozen=True, slots=True)
class Frame:
    """An archive around one record: `head`, then record_bytes of data at record_at, then `tail`. Sizes are known beforehand."""

    head: bytes
    tail: bytes
    record_bytes: int

    @property
    def record_at(self) -> int:
        return len(self.head)

    @property
    def length(self) -> int:
        return len(self.head) + self.record_bytes + len(self.tail)


def frame_archive(small: dict[str, bytes], record: str, record_bytes: int, crc: int, position: int) -> Frame:
    """An archive of `small` entries and one large record, to lie at byte `position` of a file.

    Head and tail have the same length whatever the CRC: lay the archive out with 0, write the record, frame it again.
    """
    head, directory = b"", b""
    for name, data in small.items():
        directory += _central(name, crc32(data), len(data), len(head))
        head += _local(name, crc32(data), len(data)) + data
    directory += _central(record, crc, record_bytes, len(head))
    alignment = _ALIGNMENT if record_bytes >= _ALIGNED_FROM else 64
    bare = len(head) + len(_local(record, crc, record_bytes)) + position
    # The padding is an extra field, and needs 4 bytes for its own header.
    padding = -bare % alignment
    padding += alignment if 0 < padding < 4 else 0
    head += _local(record, crc, record_bytes, padding)
    at = len(head) + record_bytes
    count = len(small) + 1
    tail = directory
    if at >= _FULL32:
        tail += struct.pack("<4sQHHIIQQQQ", _END64, 44, 45, 45, 0, 0, count, count, len(directory), at)
        tail += struct.pack("<4sIQI", _LOCATOR64, 0, at + len(directory), 1)
    tail += struct.pack("<4sHHHHIIH", _END, 0, 0, count, count, len(directory), min(at, _FULL32), 0)
    return Frame(head, tail, record_bytes)


def write_archive(entries: dict[str, bytes]) -> bytes:
    """A whole archive of small entries; the last one is its record."""
    *small, record = entries
    data = entries[record]
    frame = frame_archive({name: entries[name] for name in small}, record, len(data), crc32(data), 0)
    return frame.head + data + frame.tail


def _sizes64(size: int) -> tuple[int, bytes]:
    return (_FULL32, struct.pack("<HHQQ", 1, 16, size, size)) if size >= _FULL32 else (size, b"")


def _local(name: str, crc: int, size: int, padding: int = 0) -> bytes:
    shown, extra = _sizes64(size)
    if padding:
        extra += struct.pack("<2sH", b"FB", padding - 4) + b"Z" * (padding - 4)
    header = struct.pack(
        "<4sHHHHHIIIHH", _LOCAL, 45 if size >= _FULL32 else 20, 0, 0, *_DATE, crc, shown, shown, len(name), len(extra)
    )
    return header + name.encode() + extra


def _central(name: str, crc: int, size: int, local: int) -> bytes:
    shown, extra = _sizes64(size)
    version = 45 if size >= _FULL32 else 20
    fields = (version, version, 0, 0, *_DATE, crc, shown, shown, len(name), len(extra), 0, 0, 0, 0, local)
    return struct.pack("<4sHHHHHHIIIHHHHHII", _CENTRAL, *fields) + name.encode() + extra
