"""The trainer on a GPU: nccl, and Transformer Engine where it is installed. Skips itself without one."""

from __future__ import annotations

import pytest
import torch

from megatron_demix.train.losses import read_losses
from megatron_demix.train.trainer import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

MODEL = {"num_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2}


@pytest.mark.parametrize("impl", ["auto", "local"])
def test_a_run_learns_and_its_weights_start_another(tmp_path, make_train_job, impl, capsys):
    options = {"model": MODEL | {"transformer_impl": impl}, "train": {"precision": "bf16", "seq_length": 128}, "train_iters": 6}
    whole = make_train_job(tmp_path / "whole", tensorboard=tmp_path / "tensorboard", **options)
    train(whole)
    losses = [row["lm loss"] for row in read_losses(whole.work / "losses.jsonl")]
    assert losses[-1] < losses[0] - 0.1
    assert "iB" in capsys.readouterr().out, "the memory in use is logged"

    second = make_train_job(tmp_path / "second", init_checkpoint=whole.work, **options)
    train(second)
    assert read_losses(second.work / "losses.jsonl")[0]["lm loss"] < losses[0] - 0.1


def test_both_layer_specs_give_one_checkpoint_the_same_loss(tmp_path, make_train_job):
    base = make_train_job(tmp_path / "base", model=MODEL | {"transformer_impl": "local"}, train_iters=3)
    train(base)
    first = {}
    for impl in ("auto", "local"):
        job = make_train_job(
            tmp_path / impl, model=MODEL | {"transformer_impl": impl}, init_checkpoint=base.work, train_iters=1
        )
        train(job)
        first[impl] = read_losses(job.work / "losses.jsonl")[0]["lm loss"]
    assert first["auto"] == pytest.approx(first["local"], abs=0.02)
