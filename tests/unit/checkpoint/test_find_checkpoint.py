"""Where checkpoints are found, and what is said when they are not."""

import pytest
from dist_checkpoints import small_model, write_checkpoint

from megatron_demix.checkpoint.layout import find_checkpoint
from megatron_demix.errors import ConfigError, CorruptInput


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
    (tmp_path / "mp_rank_00").mkdir()
    with pytest.raises(ConfigError, match=r"found neither \.metadata .* nor latest_.* It holds mp_rank_00"):
        find_checkpoint(tmp_path)


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
