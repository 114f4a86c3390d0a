"""FLOPs of a token against a count of the weights by hand."""

from types import SimpleNamespace

import pytest

from megatron_demix.study.training import ModelSpec
from megatron_demix.train.compat import cpu_compat, on_cpu

with cpu_compat():
    from megatron_demix.train import journal
    from megatron_demix.train.throughput import device_memory_bytes, device_peak_flops, flops_per_token


def test_dense_and_expert_models():
    """6 FLOPs for each weight a token meets (2 forward, 4 backward), plus attention over half the sequence."""
    dense = ModelSpec(num_layers=2, hidden_size=8, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=16)
    weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 128
    scores = 2 * 2 * 8 * (10 / 2)  # two products a layer, 8 channels, 5 of 10 positions
    assert flops_per_token(dense, 10, 128) == 6 * (weights + scores)
    experts = dense.model_copy(update={"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16})
    assert flops_per_token(experts, 10, 128) - flops_per_token(dense, 10, 128) == 6 * 2 * (3 * 8 * 16 + 8 * 4)
    gelu = dense.model_copy(update={"swiglu": False, "ffn_hidden_size": None})
    assert flops_per_token(gelu, 10, 128) - flops_per_token(dense, 10, 128) == 6 * 2 * 8 * (2 * 32 - 3 * 16)


@pytest.mark.skipif(not on_cpu(), reason="a device may be in the table")
def test_a_cpu_has_no_peak_here():
    assert device_peak_flops() is None
    assert device_memory_bytes() is None


def test_use_of_the_device_is_logged(tmp_path, make_train_job, monkeypatch, capsys):
    """With the figures of an invented device: 1 TFLOP/s a rank, 3 GiB in use."""
    job = make_train_job(tmp_path, parallel={"data": 2})
    job.work.mkdir(parents=True)
    monkeypatch.setattr(journal, "device_peak_flops", lambda: 1e12)
    monkeypatch.setattr(journal, "device_memory_bytes", lambda: 3 << 30)
    seconds = iter([100.0, 100.5])
    monkeypatch.setattr(journal, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    kept = journal.Journal(job, iteration=0)
    kept.speak({"iteration": 2, "lm loss": 1.0, "learning-rate": 1e-3, "grad-norm": 1.0}, None)
    kept.close()
    tokens_per_s = job.train.global_batch_size * job.train.seq_length / 0.25
    mfu = tokens_per_s * flops_per_token(job.model, job.train.seq_length, 384) / 2e12
    assert f"| MFU {100 * mfu:.1f} % | 3 GiB" in capsys.readouterr().out
