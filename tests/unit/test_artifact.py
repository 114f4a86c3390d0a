"""Artifacts exist whole or not at all, whatever happens while they are written."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import contents
from hypothesis import given
from hypothesis import strategies as st

from megatron_demix import artifact
from megatron_demix.artifact import (
    Manifest,
    fingerprint,
    is_done,
    own_folder,
    publish,
    read_json,
    remove_leftovers,
    write_atomic,
    write_json,
    write_new,
)
from megatron_demix.errors import ConfigError, CorruptInput, OutputExists, StorageError

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def make(target, key="k1", text="hello", kind="demo", **settings):
    with publish(target, key, kind, settings) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "data.txt").write_text(text)
        (folder / ".metadata").write_bytes(b"\0\1")


@given(json_values)
def test_fingerprints_survive_json(value):
    assert fingerprint(value) == fingerprint(json.loads(json.dumps(value)))


def test_fingerprints_name_values_not_the_order_of_keys(tmp_path):
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint(tmp_path) == fingerprint(str(tmp_path))
    assert len(fingerprint(None)) == 12
    with pytest.raises(TypeError, match="a set is not JSON"):
        fingerprint({"a": {1}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint(float("nan"))


def test_publish_and_read_back(tmp_path):
    target = tmp_path / "runs" / "demo" / "data-k1"
    make(target, size=3)
    assert is_done(target)
    assert is_done(target, "k1")
    manifest = Manifest.read(target)
    assert manifest is not None
    assert (manifest.key, manifest.kind, manifest.settings) == ("k1", "demo", {"size": 3})
    assert {name: facts["bytes"] for name, facts in manifest.files.items()} == {"sub/data.txt": 5, ".metadata": 2}
    assert manifest.problems(target, digests=True) == []
    assert [p.name for p in target.parent.iterdir()] == ["data-k1"]


def test_two_runs_write_the_same_bytes(tmp_path):
    make(tmp_path / "one", size=3)
    make(tmp_path / "two", size=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_nested_manifest_is_a_file_like_any_other(tmp_path):
    with publish(tmp_path / "out", "k1", "demo", {}) as folder:
        make(folder / "inner")
    assert "inner/manifest.json" in (Manifest.read(tmp_path / "out") or pytest.fail("no manifest")).files


def test_an_error_inside_leaves_nothing(tmp_path):
    def stop(folder):
        (folder / "data").write_text("x")
        raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"), publish(tmp_path / "out", "k1", "demo", {}) as folder:
        stop(folder)
    assert list(tmp_path.iterdir()) == []
    assert not is_done(tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path):
    def fill(folder):
        (folder / "data").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = r"writing .*out: No space left"
    with pytest.raises(StorageError, match=message), publish(tmp_path / "out", "k1", "demo", {}) as folder:
        fill(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_working_folder_is_taken_over_or_kept(tmp_path):
    work = tmp_path / ".out.work"
    work.mkdir()
    (work / "checkpoint").write_text("step 10")
    with pytest.raises(ValueError, match="killed"), publish(tmp_path / "out", "k1", "train", {}, work=work):
        raise ValueError("killed")
    assert (work / "checkpoint").read_text() == "step 10"
    with publish(tmp_path / "out", "k1", "train", {}, work=work):
        pass
    assert is_done(tmp_path / "out", "k1")
    assert not work.exists()


def test_new_files_are_written_together_or_not_at_all(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write_new({one: "text", two: b"bytes"})
    assert (one.read_text(), two.read_bytes()) == ("text", b"bytes")
    write_new({one: "text", two: b"bytes"})
    one.unlink()
    two.unlink()
    for put in (lambda: two.write_text("more"), lambda: two.symlink_to(tmp_path / "absent"), two.mkdir):
        put()
        with pytest.raises(OutputExists, match="two exists, and is not what this command writes there"):
            write_new({one: "text", two: b"bytes"})
        assert not one.exists()
        two.rmdir() if two.is_dir() else two.unlink()


def test_nothing_is_overwritten(tmp_path):
    target = tmp_path / "out"
    make(target)
    before = contents(target)
    with pytest.raises(OutputExists, match=r"out is already done \(key k1\)"):
        make(target, text="other")
    with pytest.raises(OutputExists, match="holds an artifact with key k1, expected k2: it was made from other inputs"):
        make(target, key="k2")
    assert contents(target) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(OutputExists, match=f"{name} exists and is not an artifact of this project"):
            make(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert is_done(tmp_path / "out", "k1")


def test_two_writers_of_one_artifact_leave_one(tmp_path):
    target = tmp_path / "out"
    with publish(target, "k1", "demo", {}) as folder:
        (folder / "data").write_text("x")
        with publish(target, "k1", "demo", {}) as other:
            (other / "data").write_text("x")
    assert is_done(target, "k1")
    with pytest.raises(OutputExists, match="expected k2"), publish(tmp_path / "b", "k2", "demo", {}):
        make(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "out"]


def test_damage_is_noticed(tmp_path):
    target = tmp_path / "out"
    make(target)
    (target / "sub" / "data.txt").write_text("jello")
    assert is_done(target), "sizes alone are looked at here"
    problems = Manifest.read(target).problems(target, digests=True)  # type: ignore[union-attr]
    assert problems == [f"{target}/sub/data.txt has other bytes than when it was published"]
    (target / "sub" / "data.txt").write_text("cut")
    with pytest.raises(CorruptInput, match=r"out is damaged: .*data\.txt has 3 bytes, expected 5\. Delete the folder"):
        is_done(target)
    (target / "sub" / "data.txt").unlink()
    with pytest.raises(CorruptInput, match=r"data\.txt is missing"):
        is_done(target)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": "k1"}', "\udcff"])
def test_a_damaged_manifest_is_an_error_and_not_an_absence(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CorruptInput, match=r"manifest\.json: not (readable as JSON|an artifact manifest)"):
        is_done(tmp_path)


def test_small_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n'
    monkeypatch.setattr(artifact.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(StorageError, match=r"writing .*state\.json"):
        write_atomic(path, "half")
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_a_small_file_that_has_no_place_is_named(tmp_path):
    """And not the temporary one beside it, which nobody asked for."""
    with pytest.raises(FileNotFoundError) as raised:
        write_atomic(tmp_path / "absent" / "w.csv", "")
    assert raised.value.filename == str(tmp_path / "absent" / "w.csv")
    with pytest.raises(IsADirectoryError) as raised:
        write_atomic(tmp_path, "")
    assert raised.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_disk_is_said_though_nothing_is_removed_there_either(tmp_path, monkeypatch):
    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", "w.csv")

    monkeypatch.setattr("builtins.open", read_only)
    monkeypatch.setattr(artifact.Path, "unlink", read_only)
    with pytest.raises(StorageError, match=r"writing .*w\.csv: Read-only file system"):
        write_atomic(tmp_path / "w.csv", "")


def test_json_that_cannot_be_read_back_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CorruptInput, match=r"x\.json: not readable as JSON"):
        read_json(tmp_path / "x.json")


def test_leftovers_of_dead_processes_here_are_removed_and_no_others(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(timeout=60)
    host = artifact.temporary_beside(tmp_path / "out").name.removeprefix(".out.tmp-").rsplit("-", 2)[0]
    names = {
        "dead folder": f".out.tmp-{host}-{dead.pid}-0a1b2c3d",
        "living": f".out.tmp-{host}-{os.getpid()}-0a1b2c3d",
        "elsewhere": f".out.tmp-other-node-{dead.pid}-0a1b2c3d",
        "foreign": ".out.tmp-x",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text("x")
    (tmp_path / f".state.json.tmp-{host}-{dead.pid}-00000000").write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[n] for n in ("living", "elsewhere", "foreign"))


def test_containers_of_one_host_are_told_apart_without_a_machine_id(monkeypatch):
    def missing(path: Path) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_bytes", missing)
    namespaces = iter([os.stat_result(range(i, i + 10)) for i in (1, 2)])
    monkeypatch.setattr(os, "stat", lambda path: next(namespaces))
    assert artifact.this_place.__wrapped__() != artifact.this_place.__wrapped__()


def test_a_killed_writer_leaves_no_artifact_and_its_leftovers_go(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from megatron_demix.artifact import publish\n"
        "with publish(Path(sys.argv[1]), 'k1', 'demo', {}) as folder:\n"
        "    (folder / 'data').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    target = tmp_path / "out"
    result = subprocess.run([sys.executable, "-c", script, str(target)], timeout=60)
    assert result.returncode == -9
    assert not is_done(target)
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_key_given_twice_in_json(tmp_path):
    (tmp_path / "mixture.json").write_text('{"weights": {"math": 0.5, "code": 0.5, "code": 0.2}}')
    with pytest.raises(CorruptInput, match=r"mixture\.json: 'code' is given twice\. Keep one of them"):
        read_json(tmp_path / "mixture.json")


def test_a_folder_to_work_in_is_this_users(tmp_path, monkeypatch):
    own_folder(tmp_path / ".out.work")
    own_folder(tmp_path / ".out.work")  # goes on in it
    (tmp_path / "link").symlink_to(tmp_path / ".out.work")
    with pytest.raises(ConfigError, match="is a link, or belongs to another user"):
        own_folder(tmp_path / "link")
    monkeypatch.setattr("os.geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(ConfigError, match="is a link, or belongs to another user"):
        own_folder(tmp_path / ".out.work")
