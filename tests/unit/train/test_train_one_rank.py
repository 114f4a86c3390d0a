"""The trainer on one rank, in this process."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from folders import contents
from train_runs import FAMILIES

from megatron_demix.artifact import read_json
from megatron_demix.errors import ConfigError, CorruptInput, Diverged, IncompatibleInputs
from megatron_demix.indexed.writer import IndexedWriter
from megatron_demix.train.compat import cpu_compat
from megatron_demix.train.losses import read_losses
from megatron_demix.train.trainer import train


def test_weights_start_a_new_run_and_must_fit(tmp_path, make_train_job):
    base = make_train_job(tmp_path / "base", train={"precision": "bf16"}, train_iters=3)
    train(base)
    second = make_train_job(tmp_path / "second", init_checkpoint=base.work, valid={"b": base.blend[1][0]}, eval_interval=3)
    train(second)
    rows = read_losses(second.work / "losses.jsonl")
    assert rows[0]["lm loss"] < read_losses(base.work / "losses.jsonl")[0]["lm loss"] - 0.1
    evaluated = read_losses(second.work / "validation.jsonl")
    assert [(row["iteration"], "lm loss validation-b" in row) for row in evaluated] == [(3, True), (6, True)]
    misfits = {
        "embedding.word_embeddings.weight has shape [384, 32], expected [384, 48]": {"hidden_size": 48},
        "layer_norm_weight has shape [2, 32], expected [3, 32]": {"num_layers": 3},
        "it has no decoder.layers.self_attention.q_layernorm.weight, expected shape [2, 8]": {"qk_layernorm": True},
    }
    for number, (said, model) in enumerate(misfits.items()):
        other = make_train_job(tmp_path / f"other{number}", init_checkpoint=base.work, model=model)
        with pytest.raises(IncompatibleInputs, match=rf"iter_0000003 does not fit the model: .*{re.escape(said)}") as caught:
            train(other)
        if "num_layers" in model:
            assert str(caught.value).endswith("It was saved with --num-layers 2 (given: 3).")


def test_weights_the_model_has_no_place_for_are_refused_and_other_padding_is_not(tmp_path, make_train_job):
    base = make_train_job(tmp_path / "base", model={"qk_layernorm": True}, train_iters=3)
    train(base)
    plain = make_train_job(tmp_path / "plain", init_checkpoint=base.work)
    with pytest.raises(
        IncompatibleInputs, match=r"it also has decoder.layers.self_attention.k_layernorm.weight, which the model"
    ):
        train(plain)
    losses = {}
    for multiple in (64, 128, 512):  # 320, 384 and 512 rows for 257 ids
        model = {"qk_layernorm": True, "make_vocab_size_divisible_by": multiple}
        job = make_train_job(tmp_path / f"padded{multiple}", init_checkpoint=base.work, model=model, train_iters=1)
        train(job)
        losses[multiple] = read_losses(job.work / "losses.jsonl")[0]["lm loss"]
    # Rows beyond the vocabulary take part in the softmax, so a few more or less of them shift the loss a little.
    assert losses[64] < losses[128] < losses[512] < losses[128] + 0.5
    tokens = make_train_job(
        tmp_path / "tokens", init_checkpoint=base.work, model={"qk_layernorm": True}, vocab_size=400, train_iters=1
    )
    with pytest.raises(IncompatibleInputs, match=r"word_embeddings.weight has shape \[384, 32\], expected \[512, 32\]"):
        train(tokens)


def test_settings_that_make_another_function_of_the_weights(tmp_path, make_train_job):
    base = make_train_job(tmp_path / "base", model={"norm_epsilon": 1e-6}, train_iters=1)
    train(base)
    other = make_train_job(tmp_path / "other", init_checkpoint=base.work, model={"rotary_base": 500}, train_iters=1)
    said = r"it was saved with --rotary-base 10000 \(given: 500\), --norm-epsilon 1e-06 \(given: 1e-05\)\."
    with pytest.raises(IncompatibleInputs, match=f"fits the model, which would make another function of its weights: {said}"):
        train(other)


def beside_the_weights(job, name):
    """A file of the job's first checkpoint. Skips where the common state lies among the objects: since megatron.core 0.19."""
    path = job.work / "iter_0000001" / name
    if name == "common.pt" and not path.exists():
        pytest.skip("no common.pt is written")
    return path


def test_what_no_setting_here_says_is_compared_too_if_it_was_saved(tmp_path, make_train_job):
    import torch

    base = make_train_job(tmp_path / "base", model={"norm_epsilon": 1e-6}, train_iters=1)
    train(base)
    common = beside_the_weights(base, "common.pt")
    state = torch.load(common, weights_only=False)
    state["args"].rotary_interleaved = True
    torch.save(state, common)
    same = make_train_job(tmp_path / "same", init_checkpoint=base.work, model={"norm_epsilon": 1e-6}, train_iters=1)
    with pytest.raises(IncompatibleInputs, match=r"saved with rotary_interleaved True \(always False here\)"):
        train(same)
    del state["args"]  # what is not said is not compared
    torch.save(state, common)
    train(make_train_job(tmp_path / "other", init_checkpoint=base.work, model={"rotary_base": 500}, train_iters=1))


def test_metadata_that_would_run_code_is_refused(tmp_path, make_train_job):
    base = make_train_job(tmp_path / "base", train_iters=1)
    train(base)

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it ran",))

    (base.work / "iter_0000001" / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CorruptInput, match=r"iter_0000001/.metadata"):
        train(make_train_job(tmp_path / "second", init_checkpoint=base.work))
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", ["common.pt", "metadata.json"])
def test_a_checkpoint_that_was_copied_in_part_is_refused_by_the_name_of_what_is_missing(tmp_path, make_train_job, name):
    base = make_train_job(tmp_path / "base", train_iters=1)
    train(base)
    beside_the_weights(base, name).unlink()
    with pytest.raises(CorruptInput, match=rf"iter_0000001: {name} is missing, without which Megatron does not load it"):
        train(make_train_job(tmp_path / "second", init_checkpoint=base.work))


def test_sources_of_weight_zero_are_dropped_with_a_notice(tmp_path, make_train_job, byte_corpus, caplog):
    job = make_train_job(tmp_path, blend=[(byte_corpus["a"], 1.0), (tmp_path / "absent", 0.0)], train_iters=1)
    train(job)
    assert f"sources with weight 0 are left out: {tmp_path / 'absent'}" in caplog.text
    with pytest.raises(ValueError, match="every source has weight 0"):
        make_train_job(tmp_path, blend=[(byte_corpus["a"], 0.0)])


def test_a_cache_that_cannot_be_locked_is_used_with_a_warning(tmp_path, make_train_job, caplog):
    refused = mock.patch("fcntl.flock", side_effect=OSError(38, "Function not implemented"))
    with refused:
        train(make_train_job(tmp_path, train_iters=1))
    assert "index cannot be locked (Function not implemented): start nothing else that works there now" in caplog.text


def test_an_evaluation_changes_nothing_of_the_training(tmp_path, make_train_job, byte_corpus):
    plain = make_train_job(tmp_path / "plain", model=FAMILIES["gpt2"], train_iters=4)  # with dropout
    evaluated = make_train_job(
        tmp_path / "evaluated", model=FAMILIES["gpt2"], train_iters=4, valid={"b": byte_corpus["b"]}, eval_interval=1
    )
    for job in (plain, evaluated):
        train(job)
    (evaluated.work / "validation.jsonl").unlink()
    assert contents(evaluated.work) == contents(plain.work)


def test_every_setting_of_the_optimizer_has_an_effect(tmp_path, make_train_job):
    settings = {
        "seq_length": 32,  # as without it
        "lr": 1e-3,
        "min_lr": 3e-3,  # as high as lr may be
        "lr_decay_style": "linear",
        "lr_warmup_fraction": 0.5,
        "weight_decay": 10.0,
        "adam_beta1": 0.5,
        "adam_beta2": 0.5,
        "adam_eps": 1e-2,
        "clip_grad": 0.1,
    }
    losses = set()
    for name, value in settings.items():
        job = make_train_job(tmp_path / name, train={name: value}, train_iters=4)
        train(job)
        losses.add(tuple(row["lm loss"] for row in read_losses(job.work / "losses.jsonl")))
    assert len(losses) == len(settings)


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, make_train_job):
    job = make_train_job(tmp_path, train={"lr": 1e30, "lr_warmup_fraction": 0.0, "clip_grad": 0.0, "save_interval": 1})
    with pytest.raises(Diverged, match=r"run tiny: (loss|gradient norm) is .* at iteration \d, expected a finite number"):
        train(job)
    assert (job.work / "latest_checkpointed_iteration.txt").read_text() in "12345"


def test_what_a_cpu_cannot_run_is_refused(tmp_path, make_train_job):
    with pytest.raises(ConfigError, match=r"on a CPU these cannot run: parallel.context > 1 .*; parallel.sequence_parallel"):
        train(make_train_job(tmp_path, parallel={"context": 2, "sequence_parallel": True}))


TRAIN_ALL = """
import sys
from pathlib import Path
from megatron_demix.train.job import TrainJob
from megatron_demix.train.trainer import train
for path in sys.argv[1:]:
    train(TrainJob.read(Path(path)))
"""


def test_a_package_called_apex_changes_nothing(tmp_path, make_train_job):
    """An empty one: what megatron.core sees of NVIDIA's without its kernels, and of the unrelated one that pip installs."""
    (tmp_path / "packages" / "apex").mkdir(parents=True)
    (tmp_path / "packages" / "apex" / "__init__.py").touch()
    without, beside = [], []
    for name, model in {"RMSNorm": {"qk_layernorm": True}, "LayerNorm": FAMILIES["gpt2"]}.items():
        without.append(make_train_job(tmp_path / "without" / name, model=model, train_iters=1))
        train(without[-1])
        job = make_train_job(tmp_path / "beside" / name, model=model, train_iters=1)
        beside.append(tmp_path / f"{name}.json")
        beside[-1].write_text(job.model_dump_json())
    path = os.pathsep.join([str(tmp_path / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_ALL, *beside],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for job in without:
        assert contents(job.work) == contents(tmp_path / "beside" / job.work.parent.name / "work")


def test_what_needs_transformer_engine_is_refused_with_a_gpu_alone(make_train_job, tmp_path):
    with cpu_compat():
        from megatron_demix.train.model import transformer_config

        for parallel in ({"context": 2}, {"tensor": 2, "sequence_parallel": True}):
            job = make_train_job(tmp_path, parallel=parallel)
            with pytest.raises(ConfigError, match="need Transformer Engine's attention and norms"):
                transformer_config(job.model, job.train, job.parallel)
    with pytest.raises(ConfigError, match=r"needs 4 ranks; start it with torchrun"):
        train(make_train_job(tmp_path, parallel={"tensor": 2, "pipeline": 2}))
    with pytest.raises(ConfigError, match=r"transformer_impl is transformer_engine, but there is no CUDA device"):
        train(make_train_job(tmp_path, model={"transformer_impl": "transformer_engine"}))


def test_a_job_file_names_its_bad_field(tmp_path, make_train_job):
    from megatron_demix.train.job import TrainJob

    path = tmp_path / "job.json"
    job = make_train_job(tmp_path).model_dump(mode="json")
    path.write_text(json.dumps(job | {"trainiters": 3}))
    with pytest.raises(ConfigError, match=r"job .*job.json:\n  trainiters: unknown key"):
        TrainJob.read(path)
    path.write_text(json.dumps(job | {"eod_id": 999}))
    with pytest.raises(ConfigError, match="eod_id 999 is not below vocab_size 257"):
        TrainJob.read(path)
    path.write_text(json.dumps(job))
    assert TrainJob.read(path) == make_train_job(tmp_path)


def test_data_that_does_not_fit_is_named(tmp_path, make_train_job, byte_corpus):
    with pytest.raises(IncompatibleInputs, match=r"samples 0 to 1 hold token id \d+, but the vocabulary has 60"):
        train(make_train_job(tmp_path / "vocabulary", vocab_size=60, eod_id=0))
    for suffix in (".idx", ".bin"):
        shutil.copy(f"{byte_corpus['a']}{suffix}", tmp_path / f"empty{suffix}")
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(CorruptInput, match=r"empty.bin is empty, expected tokens"):
        train(make_train_job(tmp_path / "empty", blend=[(tmp_path / "empty", 1.0)]))
    with pytest.raises(ConfigError, match=r"min_lr 1.0 is above lr 0.003"):
        train(make_train_job(tmp_path / "rate", train={"min_lr": 1.0}))


def test_a_sample_runs_on_over_the_ends_of_documents(tmp_path, make_train_job):
    """As Megatron-LM's do by default: positions are counted on, and the loss is of all tokens, ends of documents too."""
    with IndexedWriter(tmp_path / "short", np.dtype(np.uint16)) as writer:
        for _ in range(20):
            writer.add(np.array([*range(7), 256], np.uint16), np.array([8]))
    job = make_train_job(tmp_path, blend=[(tmp_path / "short", 1.0)])
    with cpu_compat():
        from megatron_demix.train.data import micro_batches, training_data
        from megatron_demix.train.model import parallel_groups

        with parallel_groups(job.parallel, seed=job.seed, timeout_s=60):
            batch = next(micro_batches(training_data(job), 0, job, "cpu"))
    assert (batch["labels"] == 256).sum() == 2 * 4
    assert (batch["loss_mask"] == 1).all()
    assert batch["position_ids"].tolist() == [list(range(32))] * 2


def tokens_of(job):
    """What a job trains on, by source: tokens of all its samples."""
    with cpu_compat():
        from megatron_demix.train.data import training_data
        from megatron_demix.train.model import parallel_groups

        with parallel_groups(job.parallel, seed=job.seed, timeout_s=60):
            data = training_data(job)
            num_samples = job.train_iters * job.train.global_batch_size
            drawn = [(data.dataset_index[i], data[i]["tokens"].numpy()) for i in range(num_samples)]
    return [np.concatenate([[], *(t for source, t in drawn if source == n)]).astype(int) for n in range(len(job.blend))]


def test_data_that_is_prepared_again_at_its_place_is_indexed_again(tmp_path, make_train_job, byte_corpus):
    blend = [(tmp_path / "text", 0.5), (byte_corpus["b"], 0.5)]
    job = make_train_job(tmp_path, blend=blend, vocab_size=1000, eod_id=999)
    found = []
    for num_documents in (100, 10):
        with IndexedWriter(tmp_path / "text", np.dtype(np.uint16)) as writer:
            for number in range(num_documents):
                writer.add(np.full(64, number, np.uint16), np.array([64]))
        found.append(set(tokens_of(job)[0]))
    assert len(found[0]) > 10
    assert found[1] == set(range(10))


def test_beside_a_tiny_source_documents_are_seen_alike(tmp_path, make_train_job):
    """Each large source is wanted for a little less than one epoch. Built for several, which are shuffled as one, a third of
    its documents would not be seen and a quarter twice."""
    documents, weights = {"large": 620, "small": 410, "tiny": 50}, {"large": 0.6, "small": 0.399, "tiny": 0.001}
    for name, num_documents in documents.items():
        with IndexedWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            for number in range(num_documents):
                writer.add(np.full(32, number, np.uint16), np.array([32]))
    blend = [(tmp_path / name, weight) for name, weight in weights.items()]
    job = make_train_job(tmp_path, blend=blend, train_iters=125, vocab_size=1000, eod_id=999)
    large, small, tiny = tokens_of(job)
    assert len(tiny) > 0
    for name, tokens in {"large": large, "small": small}.items():
        seen = np.bincount(tokens, minlength=documents[name])
        assert (seen == 32).mean() > 0.95, name
        assert seen.max() <= 33, name


@pytest.mark.parametrize("num_samples", [8, 40, 200])
@pytest.mark.parametrize("num_tiny", [2, 19, 99])
def test_every_source_of_a_blend_has_the_samples_it_takes(tmp_path, make_train_job, byte_corpus, num_tiny, num_samples):
    """megatron.core rounds the samples of each source up and blends their sum, in which a large one may take more than its own
    and megatron.core's default share of spare ones; it then raises an IndexError."""
    blend = [(byte_corpus["a"], 0.5), *[(byte_corpus["b"], 0.5 / num_tiny)] * num_tiny]
    tokens = tokens_of(make_train_job(tmp_path, blend=blend, train_iters=num_samples // 8))
    assert len(tokens[0]) == pytest.approx(num_samples / 2 * 32, abs=32)


def test_a_tiny_weight_still_gets_its_samples(tmp_path, make_train_job, byte_corpus):
    weights = [(byte_corpus["a"], 0.97), (byte_corpus["b"], 0.02), (byte_corpus["b"], 0.01)]
    train(make_train_job(tmp_path, blend=weights, train_iters=5, train={"lr_decay_style": "WSD"}))


def test_without_transformer_engine_attention_is_ours_on_a_gpu_too(tmp_path, make_train_job, monkeypatch):
    """megatron.core's own keeps every score."""
    from types import SimpleNamespace

    with cpu_compat():
        from megatron_demix.train import model
        from megatron_demix.train.attention import CausalAttention

        monkeypatch.setattr(model, "on_cpu", lambda: False)
        monkeypatch.setattr(model, "get_num_layers_to_build", lambda config: config.num_layers)
        spec = make_train_job(tmp_path, model={"transformer_impl": "local"}).model
        block = model._layer_spec(spec, SimpleNamespace(num_layers=2), cached=False)
    assert [s.submodules.self_attention.submodules.core_attention for s in block.layer_specs] == [CausalAttention] * 2


def test_our_attention_refuses_what_it_would_not_look_at():
    import torch

    with cpu_compat():
        from megatron_demix.train.attention import CausalAttention
    attention = object.__new__(CausalAttention)
    x = torch.zeros(3, 1, 2, 4)
    for name in ("attention_mask", "attention_bias", "packed_seq_params"):
        with pytest.raises(AssertionError, match=name):
            CausalAttention.forward(attention, x, x, x, **{"attention_mask": None} | {name: x})


@pytest.mark.parametrize("family", FAMILIES)
def test_live_tensors_are_views_of_every_parameter(make_train_job, tmp_path, family):
    import torch

    from megatron_demix.train.compat import cpu_compat

    job = make_train_job(tmp_path, model=FAMILIES[family])
    with cpu_compat():
        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel, live_tensors

        initialize_parallel(job.parallel, seed=1, timeout_s=60)
        try:
            model = build_model(job.model, job.train, job.parallel, job.vocab_size)
            live = live_tensors(model)
            assert sum(t.tensor.numel() for t in live) == sum(p.numel() for p in model.parameters())
            for tensor in live:
                assert len(tensor.box_shape) == len(tensor.global_shape)
                with torch.no_grad():
                    tensor.tensor.fill_(7)
            assert all((p == 7).all() for p in model.parameters())
        finally:
            destroy_parallel()


def test_tensorboard_and_heartbeat_carry_megatron_names(tmp_path, make_train_job, byte_corpus, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make_train_job(
        tmp_path,
        tensorboard=tmp_path / "tb",
        heartbeat=tmp_path / "heartbeat.json",
        valid={"b": byte_corpus["b"]},
        train_iters=4,
    )
    train(job)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    every_step = {"lm loss", "learning-rate", "grad-norm"}
    now_and_then = {"iteration-time", "batch-size", "demix/tokens-per-second", "lm loss validation-b"}
    assert set(events.Tags()["scalars"]) == every_step | now_and_then
    rows = read_losses(job.work / "losses.jsonl")
    assert [e.value for e in events.Scalars("lm loss")] == pytest.approx([row["lm loss"] for row in rows])
    beat = read_json(tmp_path / "heartbeat.json")
    assert (beat["done"], beat["total"], beat["loss"]) == (4, 4, rows[-1]["lm loss"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in said] == ["tiny iteration 2/4", "tiny iteration 4/4"]
    assert " | lm loss validation-b " in said[1]


def test_the_balance_of_experts_is_reported_as_megatron_core_computes_it(tmp_path, make_train_job, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with cpu_compat():
        from megatron.core.transformer.moe.moe_utils import track_moe_metrics

        from megatron_demix.train import step
    job = make_train_job(tmp_path / "own", model=FAMILIES["moe"], tensorboard=tmp_path / "tb", train_iters=4)
    train(job)
    said = capsys.readouterr().out.splitlines()
    expected: list[float] = []
    take = step.take_load_balancing

    def by_megatron_core(device):
        found: dict = {}
        track_moe_metrics(1 / job.num_micro_batches, 1, writer=None, total_loss_dict=found, num_layers=job.model.num_layers)
        expected.append(found["load_balancing_loss"].item())
        return take(device)

    with mock.patch.object(step, "take_load_balancing", by_megatron_core):
        train(job.model_copy(update={"work": tmp_path / "again", "tensorboard": None}))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [e.value for e in events.Scalars("load_balancing_loss")] == pytest.approx(expected, rel=1e-6)
    assert all(1 <= value < 4 for value in expected)
    assert f" | load_balancing_loss {expected[3]:.4f} | " in said[1]
    assert "load_balancing_loss" not in read_losses(job.work / "losses.jsonl")[0]
