"""Components that real ranks saved with different parallelism merge, load through the stock loader, and merge in place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from dist_checkpoints import bits, read_checkpoint

from megatron_demix.checkpoint.reader import Checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("run_merge_layouts.py")), str(root)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize(
    ("family", "key", "chunks"),
    [
        ("dense", "decoder.layers.mlp.linear_fc1.weight", {"tensor": 8, "pipeline": 4}),
        ("experts", "decoder.layers.mlp.experts.experts.linear_fc2.weight", {"expert": 8, "pipeline": 8}),
    ],
)
def test_components_of_different_parallelism_merge(root, family, key, chunks):
    for rank in range(2):
        result = json.loads((root / family / f"rank{rank}.json").read_text())
        assert result["agreed"] == result["of"] > 0

    assert {name: len(Checkpoint(root / family / name).metadata.tensors[key].chunks) for name in chunks} == chunks
    # One expert a chunk either way, but not in the files of the same ranks.
    for name in chunks:
        component, merged = read_checkpoint(root / family / name), read_checkpoint(root / family / "out" / name / "release")
        assert component.keys() == merged.keys()
        assert all(bits(component[k]) == bits(merged[k]) for k in component)
