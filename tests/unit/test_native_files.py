"""Space for a file that several processes write, on file systems with and without a call for it."""

import os
import platform
import subprocess
import sys

import pytest

# fallocate(2) ends with EOPNOTSUPP in this process, as it does on NFS 3.
WITHOUT_FALLOCATE = """
import ctypes, os, struct, sys
from megatron_demix import native

number = {"x86_64": 285, "aarch64": 47}[os.uname().machine]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in (
    (0x20, 0, 0, 0),  # the system call's number
    (0x15, 0, 1, number),
    (0x06, 0, 0, 0x00050000 | 95),  # an errno: EOPNOTSUPP
    (0x06, 0, 0, 0x7FFF0000),  # allowed
)))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(program)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
if libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(filter)), 0, 0):
    sys.exit(77)
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
native.reserve(file, 1 << 24)
native.reserve(file, 1 << 20)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="needs Linux's seccomp filters"
)
def test_nothing_is_written_where_a_file_system_cannot_reserve(tmp_path):
    """The C library's posix_fallocate would write into every block, over what others write."""
    path = tmp_path / "shared"
    path.write_bytes(b"other worker's")
    done = subprocess.run([sys.executable, "-c", WITHOUT_FALLOCATE, path], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("seccomp filters are not allowed here")
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size == 1 << 24
    assert path.stat().st_blocks * 512 < 1 << 16
    assert path.read_bytes()[:14] == b"other worker's"


def test_reserving_keeps_what_is_there(tmp_path):
    from megatron_demix import native

    file = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(file, b"there", 100)
        for size in (1 << 16, 10, 0):
            native.reserve(file, size)
            assert os.fstat(file).st_size == 1 << 16
        assert os.pread(file, 5, 100) == b"there"
        with pytest.raises(OSError, match=r"File too large|No space left"):
            native.reserve(file, 1 << 62)
    finally:
        os.close(file)


PLACES = """
import resource, sys
from pathlib import Path
from megatron_demix.native import MappedFile

if sys.argv[2] == "limited":
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
files = [MappedFile(Path(sys.argv[1]), place) for place in (0, 1, 5, 129)]
print(*(file.data.ctypes.data % (256 << 20) // (2 << 20) for file in files))
assert all(file.data.tobytes() == b"elements" * 1000 for file in files)
"""


@pytest.mark.parametrize(("limit", "expected"), [("none", "0 1 5 1"), ("limited", None)])
def test_a_map_begins_at_its_place(tmp_path, limit, expected):
    """Where a limit on address space leaves no room to choose, a file is mapped anywhere."""
    path = tmp_path / "x"
    path.write_bytes(b"elements" * 1000)
    done = subprocess.run([sys.executable, "-c", PLACES, path, limit], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert expected is None or done.stdout.strip() == expected


def test_pages_that_a_map_leaves_are_mapped_again_when_they_are_read(tmp_path):
    import numpy as np

    from megatron_demix import native

    def mapped_kib() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssFile"))

    content = np.random.default_rng(0).integers(0, 256, 80 << 20, np.uint8)  # more than one piece
    content.tofile(tmp_path / "large")
    (tmp_path / "empty").touch()
    files = [native.MappedFile(tmp_path / name) for name in ("large", "empty")]
    before = mapped_kib()
    assert np.array_equal(files[0].data, content)
    assert mapped_kib() > before + (70 << 10)
    native.MappedFile.leave_pages(files, threads=2)
    assert mapped_kib() < before + (10 << 10)
    assert np.array_equal(files[0].data, content)
