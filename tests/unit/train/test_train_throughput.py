"""What is logged of a device and of how well it is used."""

from types import SimpleNamespace

import pytest

from megatron_demix.train.compat import cpu_compat, on_cpu

with cpu_compat():
    from megatron_demix.train import journal
    from megatron_demix.train.derived import flops_per_token
    from megatron_demix.train.throughput import device_memory_bytes, device_peak_flops


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
