"""lm-evaluation-harness over two ranks: every rank has the answers of one rank alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_demix.artifact import write_json
from megatron_demix.study.training import ParallelSpec
from megatron_demix.train.trainer import train

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra [eval]")
SCRIPT = Path(__file__).with_name("run_harness.py")


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=["tp2", "pp2"])
def test_every_rank_has_the_answers_of_one_alone(make_train_job, tmp_path, layout):
    from run_harness import answers

    job = make_train_job(tmp_path / "model", train_iters=3)
    train(job)
    expected = answers(job, ParallelSpec())
    write_json(tmp_path / "job.json", job.model_dump(mode="json"))
    command = [sys.executable, "-m", "megatron_demix.launch.ranks", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, str(SCRIPT), str(tmp_path / "job.json"), str(tmp_path / "found"), json.dumps(layout)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
        check=True,
    )
    for rank in range(2):
        found = json.loads((tmp_path / f"found.{rank}.json").read_text())
        assert [p[0] for p in found["pairs"]] == pytest.approx([p[0] for p in expected["pairs"]], rel=2e-6)
        assert [p[1] for p in found["pairs"]] == [p[1] for p in expected["pairs"]]
        assert found["rolling"] == pytest.approx(expected["rolling"], rel=2e-6)
        assert found["generated"] == expected["generated"]
        assert any(found["generated"])
