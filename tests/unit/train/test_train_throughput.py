"""What is logged of a device and of how well it is used."""

from types import SimpleNamespace

import pytest

from megatron_demix.train.compat import cpu_compat, on_cpu

with cpu_compat():
    from megatron_demix.train import journal, throughput
    from megatron_demix.train.derived import flops_per_token
    from megatron_demix.train.throughput import device_memory_bytes, device_peak_flops


@pytest.mark.skipif(not on_cpu(), reason="a device may be in the table")
def test_a_cpu_has_no_peak_here():
    assert device_peak_flops("bf16") is None
    assert device_memory_bytes() is None


def test_use_of_the_device_is_logged(tmp_path, make_train_job, monkeypatch, capsys):
    """With the figures of an invented device: 1 TFLOP/s a rank, 3 GiB in use."""
    job = make_train_job(tmp_path, train={"precision": "bf16"}, parallel={"data": 2})
    job.work.mkdir(parents=True)
    monkeypatch.setattr(journal, "device_peak_flops", {"bf16": 1e12}.get)
    monkeypatch.setattr(journal, "device_memory_bytes", lambda: 3 << 30)
    seconds = iter([100.0, 100.5])
    monkeypatch.setattr(journal, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    kept = journal.Journal(job, iteration=0)
    kept.speak({"iteration": 2, "lm loss": 1.0, "learning-rate": 1e-3, "grad-norm": 1.0}, None)
    kept.close()
    tokens_per_s = job.train.global_batch_size * job.train.seq_length / 0.25
    mfu = tokens_per_s * flops_per_token(job.model, job.train.seq_length, 384) / 2e12
    assert f"| MFU {100 * mfu:.1f} % | 3 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H20-3e", 148e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA B300 SXM6 AC", 2.25e15),
        ("NVIDIA GB300", 2.5e15),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8e12),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_peaks_of_devices(monkeypatch, name, peak):
    monkeypatch.setattr(throughput, "on_cpu", lambda: False)
    monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda: name)
    assert device_peak_flops("bf16") == peak
    assert device_peak_flops("fp32") is None
