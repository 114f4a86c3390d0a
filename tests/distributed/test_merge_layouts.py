"""Components that real ranks saved with different parallelism merge, load through the stock loader, and merge in place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from dist_checkpoints import bits, read_checkpoint

from megatron_demix.checkpoint.reader import Checkpoint


@pytest.mark.timeout(200)
def test_tensor_and_pipeline_parallel_components_merge(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("run_merge_layouts.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        result = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert result["agreed"] == result["of"] > 0

    key = "decoder.layers.mlp.linear_fc1.weight"
    cut = {name: len(Checkpoint(tmp_path / name).metadata.tensors[key].chunks) for name in ("tensor", "pipeline")}
    assert cut == {"tensor": 8, "pipeline": 4}
    for name in cut:
        component, merged = read_checkpoint(tmp_path / name), read_checkpoint(tmp_path / "out" / name / "release")
        assert component.keys() == merged.keys()
        assert all(bits(component[k]) == bits(merged[k]) for k in component)
