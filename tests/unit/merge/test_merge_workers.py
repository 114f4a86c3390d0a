"""Several workers write one merge: each some of the files, the last one publishes, and a killed one's part is made again."""

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from dist_checkpoints import parallel_cuts, small_model, write_checkpoint
from folders import contents

from megatron_demix import artifact
from megatron_demix.checkpoint import output as output_module
from megatron_demix.checkpoint import writer
from megatron_demix.errors import ConfigError, CorruptInput, VerificationFailed
from megatron_demix.merge import engine
from megatron_demix.merge.command import main
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.logical_tensors import FusedLayout
from megatron_demix.merge.methods_by_name import make_method

MIXTURES = {"m": {"a": 0.5, "b": 0.5}, "n": {"a": 0.25, "b": 0.75}}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_FILE_BYTES", 1024)  # several files of a small model
    return {n: write_checkpoint(tmp_path / n, small_model(s), parallel_cuts(2 - s), odd=True) for s, n in enumerate("ab")}


def merge(parts, output, worker=None, mixtures=None, **settings):
    return merge_checkpoints(parts, mixtures or MIXTURES, output, worker=worker, progress=False, threads=1, **settings)


def test_the_last_worker_publishes_the_bytes_of_one_alone(parts, tmp_path):
    merge(parts, tmp_path / "alone")
    out = tmp_path / "out"
    assert merge(parts, out, (2, 3)) == []
    assert merge(parts, out, (0, 3)) == []
    assert not [p for p in out.iterdir() if not p.name.startswith(".")]
    assert merge(parts, out, (1, 3)) == [out / "m", out / "n"]
    assert contents(out) == contents(tmp_path / "alone")
    assert len(list((out / "m" / "release").glob("*.distcp"))) > 3
    assert merge(parts, out, (0, 3)) == [out / "m", out / "n"]


def test_the_lock_of_a_worker_that_was_killed_once_it_had_published_does_not_stay(parts, tmp_path):
    out = tmp_path / "out"
    merge(parts, out, (0, 1))
    made = contents(out)
    (out / ".m.lock").touch()
    assert merge(parts, out) == [out / "m", out / "n"]
    assert contents(out) == made


def test_an_empty_folder_is_no_published_output(parts, tmp_path):
    (tmp_path / "out" / "m").mkdir(parents=True)
    assert merge(parts, tmp_path / "out", (0, 2)) == []
    assert merge(parts, tmp_path / "out", (1, 2)) == [tmp_path / "out" / "m", tmp_path / "out" / "n"]


@pytest.mark.parametrize("workers", [2, 40])
def test_at_the_same_time(parts, tmp_path, workers):
    merge(parts, tmp_path / "alone")
    out = tmp_path / "out"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: merge(parts, out, (i, workers)), range(workers)))
    assert contents(out) == contents(tmp_path / "alone")


def test_a_file_system_without_locks(parts, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    merge(parts, tmp_path / "alone")
    out = tmp_path / "out"
    out.mkdir()
    with artifact.only_maker(out / "m"), artifact.only_maker(out / "m"):  # nothing keeps the second one out
        pass
    assert [merge(parts, out, (i, 2)) for i in range(2)] == [[], [out / "m", out / "n"]]
    assert contents(out) == contents(tmp_path / "alone")


def test_a_method_that_decides_by_tensor(parts, tmp_path):
    base = write_checkpoint(tmp_path / "base", small_model(7))
    layout = FusedLayout(num_query_groups=1, kv_channels=8, swiglu=True)
    method = make_method("ties", base, layout=layout, density=0.5)
    merge(parts, tmp_path / "alone", method=method, verify="full")
    for i in range(2):
        merge(parts, tmp_path / "out", (i, 2), method=method, verify="full")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["complete", "finish", "write_json", "seal", "publish"])
def test_a_worker_that_dies_is_run_again(parts, tmp_path, monkeypatch, step):
    """Dies as SIGKILL would have it: nothing is cleaned up."""
    merge(parts, tmp_path / "alone")
    out = tmp_path / "out"
    merge(parts, out, (0, 2))

    def die(self, *arguments, **named):
        raise Killed

    with monkeypatch.context() as patch:
        # write_json: a file is in its place, and what says that it is whole is not there yet.
        patch.setattr(output_module if step == "write_json" else output_module.Output, step, die)
        patch.setattr(output_module.Output, "discard", lambda self: None)
        with pytest.raises(Killed):
            merge(parts, out, (1, 2))
    assert not (out / "m").exists()
    assert merge(parts, out, (1, 2)) == [out / "m", out / "n"]
    assert contents(out) == contents(tmp_path / "alone")


@pytest.mark.parametrize(
    ("step", "error", "published"),
    [((output_module.Output, "publish"), Killed, ["m", "n"]), ((engine, "verify_merge"), VerificationFailed, [])],
)
def test_who_makes_the_same_files_and_fails_meanwhile_costs_no_more(parts, tmp_path, monkeypatch, step, error, published):
    """It has removed what the other was about to finish: as left over, when it sealed; or with all the rest."""
    merge(parts, tmp_path / "alone")
    out, complete = tmp_path / "out", output_module.Output.complete

    def fail(*arguments):
        raise error

    def overtaken(self, *arguments):
        complete(self, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(output_module.Output, "complete", complete)
            patch.setattr(output_module.Output, "discard", lambda self: None)
            patch.setattr(*step, fail)
            with pytest.raises(error):
                merge(parts, out, (0, 1), {self.target.name: MIXTURES[self.target.name]})

    with monkeypatch.context() as patch:
        patch.setattr(output_module.Output, "complete", overtaken)
        assert merge(parts, out, (0, 1)) == [out / name for name in published]
    merge(parts, out, (0, 1))
    assert contents(out) == contents(tmp_path / "alone")


def test_what_fails_to_verify_is_not_published_nor_kept(parts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    merge(parts, out, (0, 2))

    def refuse(*arguments):
        raise VerificationFailed("no")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "verify_merge", refuse)
        with pytest.raises(VerificationFailed):
            merge(parts, out, (1, 2))
    assert not (out / "m").exists()
    merge(parts, out, (1, 2))
    merge(parts, out, (0, 2))
    merge(parts, tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")


def test_a_record_read_in_part_is_checked_whole(parts, tmp_path):
    """Components are cut differently, so that a worker needs parts of records."""
    file = parts["b"] / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    whole = small_model(1)["decoder.layers.mlp.linear_fc1.weight"]
    at = data.find(whole[0, :32].contiguous().view(torch.uint8).numpy().tobytes())
    assert at > 0
    data[at] ^= 1
    file.write_bytes(data)
    for i in range(5):
        with suppress(CorruptInput):
            merge(parts, tmp_path / "out", (i, 5))
    assert not (tmp_path / "out" / "m").exists()
    assert not [p for p in (tmp_path / "out").rglob("*") if artifact.is_temporary(p)], "what was made in part is removed"


def test_flags(parts, tmp_path, monkeypatch, capsys):
    common = [f"{parts['a']}:0.5", f"{parts['b']}:0.5", "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*common, "--worker", "0"]) == 2
    assert main([*common, "--worker", "x", "--workers", "2"]) == 2
    assert main([*common, "--worker", "2", "--workers", "2"]) == 2
    for rank, _ in engine_ranks():
        monkeypatch.delenv(rank, raising=False)
    assert main([*common, "--worker", "auto"]) == 2
    monkeypatch.setenv("SLURM_PROCID", "0")  # as a batch script has them, in which nothing else was started
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert main([*common, "--worker", "auto"]) == 2
    assert "--worker auto: neither torchrun nor srun has started this process" in capsys.readouterr().err
    assert main([*common, "--worker", "0", "--workers", "2"]) == 0
    assert "not published yet" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert main([*common, "--worker", "auto"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def engine_ranks():
    from megatron_demix.merge.command import _RANKS

    return _RANKS


def test_numbers_of_workers(parts, tmp_path):
    with pytest.raises(ConfigError, match=r"worker is 2 of 2, expected 0 <= worker < number of workers"):
        merge(parts, tmp_path / "out", (2, 2))


def test_layouts_share_no_work(parts, tmp_path):
    """One worker of two with another layout: what it has made is in nothing that is published, and goes when the other is."""
    merge(parts, tmp_path / "out", (0, 2))
    for i in range(2):
        merge(parts, tmp_path / "out", (i, 2), layout="iter")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["m", "n"]
    assert sorted(p.name for p in (tmp_path / "out" / "m").iterdir()) == ["iter_0000100", "latest_checkpointed_iteration.txt"]


def test_work_that_was_given_up_goes_when_the_merge_is_made_alone(parts, tmp_path):
    merge(parts, tmp_path / "out", (0, 2))
    assert len(list((tmp_path / "out").glob(".*work*"))) == 2
    merge(parts, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["m", "n"]
