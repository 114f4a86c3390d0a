"""Blends whose making is disturbed: killed, out of disk, in competition, spread over workers."""

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from blends import build

from megatron_demix.artifact import temporary_beside
from megatron_demix.data import blend_data
from megatron_demix.data.verify import verify_blend
from megatron_demix.errors import ConfigError, OutputExists

ROOT = Path(__file__).parents[3]


def test_foreign_file_at_the_target_is_kept(pool, tmp_path):
    (tmp_path / "b.bin").write_bytes(b"mine")
    with pytest.raises(OutputExists, match=r"b\.bin exists, but the rest of it does not"):
        build(pool, tmp_path / "b")
    assert (tmp_path / "b.bin").read_bytes() == b"mine"


def test_killed_while_publishing(pool, tmp_path, monkeypatch):
    expected = build(pool, tmp_path / "whole")
    rename, done = os.rename, []

    def dies(source, target):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        build(pool, tmp_path / "b")
    monkeypatch.undo()
    assert not (tmp_path / "b.blend.json").exists()
    assert build(pool, tmp_path / "b") == expected
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_full_disk_leaves_nothing(pool, tmp_path):
    limited = f"""
import resource, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
from megatron_demix.data.blend import Pool, Source, build_blend
from megatron_demix.errors import StorageError
from megatron_demix.mixture import Mixture
pool = Pool(code=Source((Path("pool/code_0"),)))
for mode in ("view", "materialise"):
    try:
        build_blend(pool, Mixture(dict(code=1)), 40_000, Path("b"), mode=mode, seed=1, progress=False)
    except StorageError as e:
        print(e)
"""
    done = subprocess.run([sys.executable, "-c", limited], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("writing blend b: File too large") == 2, done.stderr
    assert not list(tmp_path.glob("b.*"))


def test_workers_write_one_blend_together(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(blend_data, "SHARD_BYTES", 1)
    monkeypatch.setattr(blend_data, "SHARD_STEP_DOCUMENTS", 100)
    whole = build(pool, tmp_path / "whole" / "b", mode="materialise")
    first = build(pool, tmp_path / "b", mode="materialise", worker=(1, 3))
    assert first["files"] == {}
    assert not (tmp_path / "b.bin").exists()
    assert build(pool, tmp_path / "b", mode="materialise", worker=(0, 3))["files"] == {}
    assert build(pool, tmp_path / "b", mode="materialise", worker=(2, 3))["files"] == whole["files"]
    assert build(pool, tmp_path / "b", mode="materialise", worker=(0, 3))["files"] == whole["files"]
    for suffix in (".bin", ".idx", ".domains.npy"):
        assert (tmp_path / f"b{suffix}").read_bytes() == (tmp_path / "whole" / f"b{suffix}").read_bytes()
    with pytest.raises(ConfigError, match="worker is 3 of 3 in mode materialise"):
        build(pool, tmp_path / "c", mode="materialise", worker=(3, 3))
    with pytest.raises(ConfigError, match="and mode materialise"):
        build(pool, tmp_path / "c", worker=(0, 3))


KILLED = """
import os, signal
from pathlib import Path
from blends import MIXTURE, build
from megatron_demix import native
from megatron_demix.data import blend_data
from megatron_demix.data.blend import Pool, Source
blend_data.SHARD_BYTES, blend_data.SHARD_STEP_DOCUMENTS = 1, 100
calls, gather = [], native.gather
def dies(*arguments, **options):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return gather(*arguments, **options)
native.gather = dies
pool = Pool({name: Source((Path(f"pool/{name}_0"),)) for name in MIXTURE})
build(pool, Path("b"), mode="materialise", worker=eval(os.environ.get("WORKER", "None")))
"""


def test_killed_while_writing(pool, tmp_path, monkeypatch):
    from megatron_demix import native

    monkeypatch.setattr(blend_data, "SHARD_BYTES", 1)
    monkeypatch.setattr(blend_data, "SHARD_STEP_DOCUMENTS", 100)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    dead = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert dead.returncode == -9, dead.stderr
    assert not list(tmp_path.glob("b.*"))
    written, gather = [], native.gather
    monkeypatch.setattr(native, "gather", lambda *a, **o: (written.append(a[2]), gather(*a, **o))[1])
    resumed = build(pool, tmp_path / "b", mode="materialise")
    assert written[0] == 300  # the three finished shards were kept
    whole = build(pool, tmp_path / "whole", mode="materialise")
    assert resumed["content"] == whole["content"]
    for suffix in (".bin", ".idx", ".domains.npy", ".blend.json"):
        assert (tmp_path / f"b{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".b")] == []


def test_a_killed_worker_is_started_again(pool, tmp_path, monkeypatch):
    """One of three dies in its shards; the others finish without publishing, and its next start does the rest."""
    monkeypatch.setattr(blend_data, "SHARD_BYTES", 1)
    monkeypatch.setattr(blend_data, "SHARD_STEP_DOCUMENTS", 40)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "WORKER": "(1, 3)"}
    killed = KILLED.replace("SHARD_STEP_DOCUMENTS = 1, 100", "SHARD_STEP_DOCUMENTS = 1, 40")
    dead = subprocess.run([sys.executable, "-c", killed], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert dead.returncode == -9, dead.stderr
    for worker in ((0, 3), (2, 3)):
        assert build(pool, tmp_path / "b", mode="materialise", worker=worker)["files"] == {}
    assert not list(tmp_path.glob("b.*"))
    published = build(pool, tmp_path / "b", mode="materialise", worker=(1, 3))
    assert published == build(pool, tmp_path / "whole", mode="materialise")
    for suffix in published["files"]:
        assert (tmp_path / f"b{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_two_builders_share_a_pool_that_neither_has_made(pool, tmp_path, monkeypatch):
    """Of different views, in processes that have one number, as those of two containers may; the second dies."""
    copy, entered = blend_data._copy_bin, threading.Semaphore(0)

    def slow(index, base, out, advance):
        if threading.current_thread().name == "second":
            entered.release()
            raise MemoryError
        copy(index, base, out, advance)
        if second.ident is None:
            second.start()
            entered.acquire(timeout=1)

    def build_second():
        with suppress(MemoryError):
            build(pool, tmp_path / "second", seed=4, pool_cache=tmp_path / "cache")

    monkeypatch.setattr(blend_data, "_copy_bin", slow)
    second = threading.Thread(target=build_second, name="second")
    build(pool, tmp_path / "first", pool_cache=tmp_path / "cache")
    second.join(timeout=60)
    (shared,) = (tmp_path / "cache").iterdir()
    assert shared.read_bytes() == b"".join((tmp_path / "pool" / f"{name}_0.bin").read_bytes() for name in pool)
    for name in ("first", "second"):
        assert verify_blend(tmp_path / name, progress=False)["sources"] == "compared"


def test_a_shared_pool_that_could_not_be_made_leaves_nothing(pool, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    left = temporary_beside(tmp_path / "cache" / "pool-killed.bin")
    dead = subprocess.Popen(["true"])
    dead.wait()
    left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")).touch()
    monkeypatch.setattr(blend_data, "_copy_range", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(pool, tmp_path / "b", pool_cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


TWICE = """
from pathlib import Path
from blends import MIXTURE, build
from megatron_demix.data.blend import Pool, Source
pool = Pool({name: Source((Path(f"pool/{name}_0"),)) for name in MIXTURE})
for n in range(10):
    print(build(pool, Path(f"b{n}"), mode="materialise")["content"])
"""


def test_two_builders_on_one_target(pool, tmp_path):
    command = [sys.executable, "-c", TWICE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    builders = [subprocess.Popen(command, **options) for _ in range(2)]
    (one, errors_one), (two, errors_two) = (b.communicate(timeout=120) for b in builders)
    assert [b.returncode for b in builders] == [0, 0], errors_one + errors_two
    assert one == two
    assert len(set(one.split())) == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    assert verify_blend(tmp_path / "b9", progress=False)["sources"] == "compared"
