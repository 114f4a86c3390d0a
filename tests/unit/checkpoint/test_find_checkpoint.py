"""Where checkpoints are found, and what is said when they are not."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from dist_checkpoints import small_model, write_checkpoint

from megatron_demix.checkpoint.common_state import read_common_state
from megatron_demix.checkpoint.layout import TRACKER, find_checkpoint, unreadable
from megatron_demix.checkpoint.reader import Checkpoint
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_checkpoint(root / "iter_0000100", {"w": small_model(0)["decoder.final_layernorm.weight"]})
    write_checkpoint(root / "release", {"w": small_model(0)["decoder.final_layernorm.weight"]})
    write_checkpoint(root / "somewhere", {"w": small_model(0)["decoder.final_layernorm.weight"]})
    return root


def test_root_follows_the_tracker(run):
    (run / "latest_checkpointed_iteration.txt").write_text("100\n")
    found = find_checkpoint(run)
    assert (found.path, found.root, found.iteration, found.kind) == (run / "iter_0000100", run, 100, "iter")
    (run / "latest_checkpointed_iteration.txt").write_text("release")
    found = find_checkpoint(run)
    assert (found.path, found.root, found.iteration, found.kind) == (run / "release", run, None, "release")


def test_folders_are_taken_as_they_are(run):
    assert find_checkpoint(run / "iter_0000100").iteration == 100
    assert find_checkpoint(run / "release").kind == "release"
    bare = find_checkpoint(run / "somewhere")
    assert (bare.kind, bare.root) == ("bare", run / "somewhere")


def test_nothing_there(tmp_path):
    with pytest.raises(ConfigError, match=r"no such folder"):
        find_checkpoint(tmp_path / "absent")
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"found neither \.metadata .* nor latest_.* It holds model\. "):
        find_checkpoint(tmp_path)
    (tmp_path / "common.pt").write_text("")
    with pytest.raises(ConfigError, match=r"common.pt: is a file\. Give a folder: "):
        find_checkpoint(tmp_path / "common.pt")


def test_damaged_tracker(tmp_path):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("soon")
    with pytest.raises(CorruptInput, match=r"holds 'soon', expected an iteration number or 'release'"):
        find_checkpoint(tmp_path)
    tracker.write_text("7")
    with pytest.raises(CorruptInput, match=r"names 7, but .*iter_0000007/.metadata is missing"):
        find_checkpoint(tmp_path)
    tracker.write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptInput, match=r"cannot be read"):
        find_checkpoint(tmp_path)


def test_iterations_that_were_finished_are_named(tmp_path):
    for i in (100, 200, 300):
        (tmp_path / f"iter_0000{i}").mkdir()
        (tmp_path / f"iter_0000{i}" / "__0_0.distcp").write_text("")
    (tmp_path / "iter_²").mkdir()
    with pytest.raises(ConfigError, match=r"found neither \.metadata .* it is written last"):
        find_checkpoint(tmp_path)
    (tmp_path / TRACKER).write_text("300")
    with pytest.raises(CorruptInput, match=r"was not finished, or only copied in part\. No other one there was either\."):
        find_checkpoint(tmp_path)
    for i in (100, 200):
        (tmp_path / f"iter_0000{i}" / ".metadata").write_text("")
    with pytest.raises(CorruptInput, match=r"Give the folder of one that was finished: iter_0000100, iter_0000200\.$"):
        find_checkpoint(tmp_path)
    (tmp_path / TRACKER).unlink()
    with pytest.raises(ConfigError, match=rf"has no {TRACKER}, .* Give the folder of one: iter_0000100, iter_0000200\.$"):
        find_checkpoint(tmp_path)


def test_many_iterations_are_not_all_named(tmp_path):
    for i in range(1, 9):
        (tmp_path / f"iter_000000{i}").mkdir()
        (tmp_path / f"iter_000000{i}" / ".metadata").write_text("")
    with pytest.raises(ConfigError, match=r"the folder of one: \.\.\., iter_0000003, .*, iter_0000008\.$"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("rank", ["mp_rank_00", "mp_rank_00_001"])
def test_a_legacy_checkpoint_is_no_damage(tmp_path, rank, tracked):
    folder = tmp_path / "iter_0000100" / rank
    folder.mkdir(parents=True)
    (folder / "model_optim_rng.pt").write_text("")
    if tracked:
        (tmp_path / TRACKER).write_text("100")
    for given in (tmp_path, folder.parent, folder):
        with pytest.raises(
            IncompatibleInputs, match=r"legacy 'torch' .* expected 'torch_dist'.* --ckpt-convert-format torch_dist"
        ):
            find_checkpoint(given)


def test_a_zarr_checkpoint_is_no_damage(tmp_path):
    (tmp_path / "iter_0000100").mkdir()
    described = tmp_path / "iter_0000100" / "metadata.json"
    described.write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    (tmp_path / TRACKER).write_text("100")
    for given in (tmp_path, tmp_path / "iter_0000100"):
        with pytest.raises(
            IncompatibleInputs, match=r"is 'zarr', expected 'torch_dist'. .* again with --ckpt-format torch_dist"
        ):
            find_checkpoint(given)
    described.write_text(json.dumps({"sharded_backend": "torch_dist"}))
    with pytest.raises(CorruptInput, match="was not finished"):
        find_checkpoint(tmp_path)
    described.write_text("{")
    with pytest.raises(CorruptInput, match="was not finished"):
        find_checkpoint(tmp_path)


@pytest.fixture
def as_another_user():
    """A folder where what this process does is refused as to a user without rights."""
    folder = Path(tempfile.mkdtemp())  # pytest's own is closed to others
    folder.chmod(0o755)
    mine = os.geteuid()
    yield folder
    os.seteuid(mine)
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", [".metadata", "metadata.json", "common.pt", "__0_0.distcp", "", ".."])
def test_what_may_not_be_read_is_no_damage(as_another_user, what):
    folder = write_checkpoint(as_another_user / "run" / "iter_0000100", small_model(0))
    (folder.parent / TRACKER).write_text("100")
    (folder / what).chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)

    def read():
        checkpoint = Checkpoint(folder.parent)
        read_common_state(checkpoint)
        info = next(iter(checkpoint.model_tensors.values()))
        checkpoint.payload(info, info.chunks[0])

    with pytest.raises(ConfigError, match=r": this user may not read it \(Permission denied\).*\. Correct its permissions"):
        read()


def test_too_many_open_files_are_no_damage(tmp_path):
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    refused = unreadable(tmp_path, error)
    assert isinstance(refused, ConfigError)
    assert str(refused) == (
        f"{tmp_path}: no more files can be open at once (Too many open files). Raise that limit: ulimit -n 65536."
    )
