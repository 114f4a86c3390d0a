"""Stages: keys follow settings and needs; an artifact is there whole or not at all."""

import shutil
from dataclasses import replace

import pytest

from megatron_demix.artifact import Manifest, read_json, write_json
from megatron_demix.errors import CorruptInput
from megatron_demix.pipeline.stage import Stage, with_needs


def stage(run, name="data/a", settings=None, needs=(), text="hello", ranks=0):
    return Stage(name, run, settings or {"x": 1}, needs, lambda folder: (folder / "out.txt").write_text(text), ranks)


def test_key_follows_settings_and_needs(tmp_path):
    a = stage(tmp_path)
    assert a.key == stage(tmp_path / "elsewhere").key, "where a stage runs does not change what it makes"
    assert a.key != stage(tmp_path, settings={"x": 2}).key
    child = stage(tmp_path, "train/b", needs=(a,))
    assert child.key != stage(tmp_path, "train/b", needs=(stage(tmp_path, settings={"x": 2}),)).key
    assert child.kind == "train"


def test_finish_publishes_under_the_key(tmp_path):
    a = stage(tmp_path)
    assert (a.state(), a.damage()) == ("to do", "")
    a.finish()
    assert (a.state(), a.damage()) == ("done", "")
    assert (a.folder / "out.txt").read_text() == "hello"
    manifest = Manifest.read(a.folder)
    assert manifest is not None
    assert manifest.key == a.key
    assert list(tmp_path.rglob(".*tmp-*")) == []


def test_a_failing_make_leaves_nothing(tmp_path):
    def make(folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("broken")

    broken = Stage("data/a", tmp_path, {}, (), make)
    with pytest.raises(RuntimeError, match="broken"):
        broken.finish()
    assert broken.state() == "to do"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("ranks", [0, 2])
def test_what_is_not_what_it_has_to_be_is_not_published(tmp_path, ranks):
    def judge(folder):
        raise CorruptInput((folder / "out.txt").read_text())

    a = replace(stage(tmp_path, ranks=ranks), judge=judge)
    if ranks:
        a.begin()
    with pytest.raises(CorruptInput, match="hello"):
        a.finish()
    assert a.state() == ("partial" if ranks else "to do"), "what ranks have made stays"


def test_damage_is_noticed(tmp_path):
    a = stage(tmp_path)
    a.finish()
    (a.folder / "out.txt").write_text("hello, world")
    with pytest.raises(CorruptInput, match=r"damaged: .*out.txt has 12 bytes, expected 5"):
        a.done()
    assert (a.state(), a.is_intact()) == ("damaged", False)
    assert a.damage().endswith("Delete the folder to have it made again.")
    (a.folder / "manifest.json").unlink()
    assert (a.state(), a.damage().startswith(f"{a.folder} exists and is not an artifact")) == ("damaged", True)


def test_ranks_keep_their_work_between_runs(tmp_path):
    a = stage(tmp_path, ranks=2)
    assert a.state() == "to do"
    a.begin()
    assert a.state() == "partial"
    a.finish()
    assert a.state() == "done"
    assert not a.work.exists()


@pytest.mark.parametrize("part", [None, (1, 2)])
def test_ranks_do_not_begin_a_job_of_an_earlier_run(tmp_path, part):
    """It was written before they were killed; make then finds that nothing is left for them to do."""
    whole = Stage("data/a", tmp_path, {}, (), lambda folder: None, ranks=2, make_part=lambda folder, index: None)
    a = whole.part(part) if part else whole
    a.job.parent.mkdir(parents=True)
    write_json(a.job, {"step": 1})
    write_json(a.heartbeat, {"done": 9, "total": 10})
    assert not a.begin()
    assert not a.heartbeat.exists(), "it would say how far the ranks of that run were"


def test_parts_are_made_in_the_work_folder_and_put_together(tmp_path):
    def make(folder, part=None):
        if part:
            (folder / f"part-{part[0]}").write_text(str(part))
            return
        parts = sorted(folder.glob("part-*"))
        (folder / "out.txt").write_text("".join(p.read_text() for p in parts))
        for path in parts:
            path.unlink()

    a = Stage("data/a", tmp_path, {}, (), make, make_part=make)
    first, second = a.part((0, 2)), a.part((1, 2))
    assert (second.name, second.kind, second.key, second.whole) == ("data/a@1-of-2", "data", a.key, a)
    second.finish()
    assert (a.state(), second.done(), first.done()) == ("partial", True, False)
    first.finish()
    a.finish()
    assert (a.folder / "out.txt").read_text() == "(0, 2)(1, 2)"
    assert (a.state(), first.done(), a.work.exists()) == ("done", True, False)
    assert sorted(p.name for p in a.folder.iterdir()) == ["manifest.json", "out.txt"]
    assert Stage("data/a", tmp_path, {}, (), make).key == a.key


@pytest.mark.parametrize("lost", ["artifact", "work"])
def test_parts_of_what_was_deleted_are_made_again(tmp_path, lost):
    def make(folder, part=None):
        (folder / f"part-{part}").write_text("x")

    a = Stage("data/a", tmp_path, {}, (), make, make_part=make)
    for number in range(2):
        a.part((number, 2)).finish()
    if lost == "artifact":
        a.finish()
    shutil.rmtree(a.folder if lost == "artifact" else a.work)
    assert [a.part((number, 2)).done() for number in range(2)] == [False, False]
    a.part((0, 2)).finish()
    assert [a.part((number, 2)).done() for number in range(2)] == [True, False]


def test_a_part_with_ranks_has_a_job_of_its_own_and_publishes_nothing(tmp_path):
    def make(folder, part=None):
        write_json(a.part(part).job, {"work": str(folder), "part": part})

    a = Stage("rounds/a", tmp_path, {}, (), make, ranks=2, make_part=make)
    part = a.part((1, 3))
    assert part.ranks == 2
    assert part.begin()
    assert part.job != a.job
    assert read_json(part.job) == {"work": str(a.work), "part": [1, 3]}
    part.finish()
    assert (part.done(), a.part((0, 3)).done(), a.done()) == (True, False, False)


def test_with_needs_lists_needs_first_and_once(tmp_path):
    a = stage(tmp_path)
    b = stage(tmp_path, "train/b", needs=(a,))
    c = stage(tmp_path, "train/c", needs=(a, b))
    assert [s.name for s in with_needs([c, b])] == ["data/a", "train/b", "train/c"]
