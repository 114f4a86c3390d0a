"""Stock Megatron-LM as the trainer: its command, and what becomes of a run that ends well, early or badly. A stand-in takes the
place of pretrain_gpt.py; end_to_end/test_stock_megatron_lm.py runs the real one."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import pickle
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from unittest import mock

import pytest
import torch
from dist_checkpoints import bits, read_checkpoint, small_model, write_checkpoint
from small_texts import write_texts
from stock_runs import RUNS, stock_run

from megatron_demix.cli import main
from megatron_demix.errors import ConfigError, StageFailed, UnsafeInput
from megatron_demix.study.training import TrainerSpec
from megatron_demix.train.losses import read_losses
from megatron_demix.train.megatron_lm import arguments as stock
from megatron_demix.train.megatron_lm.checkout import SUPPORTED, Checkout
from megatron_demix.train.megatron_lm.command import shown_command
from megatron_demix.train.megatron_lm.log import parse_iteration
from megatron_demix.train.megatron_lm.work import settle

TESTS = Path(__file__).parents[2]
OPTIONS = json.loads((TESTS / "contract" / "megatron_lm_options.json").read_text())
STUDY = """
name: s
tokenizer: {type: byte}
domains:
  - {name: code, inputs: [code.jsonl], max_epochs: 100}
  - {name: english, inputs: [english.jsonl], max_epochs: 100}
model: {num_layers: 2, hidden_size: 8, num_attention_heads: 2}
train: {seq_length: 16, global_batch_size: 4, save_interval: 2, log_interval: 2, loss_spike_window: 2}
base: {checkpoint: base/iter_0000100}
component: {maturity_seeds: 0, tokens: 512}                  # 8 steps
search: {rounds: [8], objective: {code: 1}}
final: {tokens: 512}
"""


def fake_checkout(folder: Path, version: str = "0.16.1") -> Path:
    (folder / "megatron" / "core").mkdir(parents=True)
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (folder / "megatron" / "core" / "package_info.py").write_text("".join(f"{n} = {v}\n" for n, v in numbers))
    (folder / "pretrain_gpt.py").write_text("")
    return folder


def flags(job, version=(0, 16), own=(), transformer_engine=True, start=None):
    words = stock.pretrain_arguments(
        job, list(own), data=Path("data.json"), start=start, version=version, transformer_engine=transformer_engine
    )
    options = [i for i, word in enumerate(words) if word.startswith("--")]
    return {words[i][2:]: words[i + 1 : j] for i, j in zip(options, [*options[1:], len(words)], strict=True)}


@pytest.mark.parametrize("version", SUPPORTED, ids=str)
@pytest.mark.parametrize("kind", RUNS)
def test_every_option_exists_in_every_supported_version_and_has_an_owner(tmp_path, kind, version):
    for transformer_engine in (True, False):
        written = set(flags(stock_run(kind, tmp_path), version, transformer_engine=transformer_engine, start=tmp_path))
        common, own = OPTIONS["all"], OPTIONS["only"][".".join(map(str, version))]
        assert not written - {*common, *own}
        free = {"attention-softmax-in-fp32", "no-create-attention-mask-in-dataloader", "moe-token-dispatcher-type"}
        free |= {"recompute-method", "recompute-num-layers", "tokenizer-type"}
        free |= {option for option in written if option.endswith("fusion") or option == "no-persist-layer-norm"}
        assert not written - set(stock.OWNED) - free


@pytest.mark.parametrize("transformer_engine", [True, False])
def test_gradients_are_fused_only_with_apex_s_kernel(tmp_path, monkeypatch, transformer_engine):
    """With Transformer Engine, too, the output layer is megatron.core's own, which asks for it."""
    option, job = "no-gradient-accumulation-fusion", stock_run("dense", tmp_path)
    assert option in flags(job, transformer_engine=transformer_engine)
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert option not in flags(job, transformer_engine=transformer_engine)


def test_options_that_contradict_exist_somewhere():
    known = {*OPTIONS["all"], *(o for options in OPTIONS["only"].values() for o in options)}
    assert not (set(stock.OWNED) | stock.OTHER_WEIGHTS) - known


def test_what_the_study_says_is_what_megatron_is_told(tmp_path):
    job = stock_run("every parallelism", tmp_path)
    found = flags(job)
    assert found["lr-warmup-iters"] == ["0"]
    assert (found["lr-wsd-decay-style"], found["lr-wsd-decay-iters"]) == (["linear"], ["4"])
    assert (found["tensor-model-parallel-size"], found["context-parallel-size"]) == (["2"], ["2"])
    # Padded as ours: to 128, whatever the tensor parallelism.
    assert found["make-vocab-size-divisible-by"] == ["64"]
    assert found["save"] == found["load"] == [str(job.work)]
    assert "pretrained-checkpoint" not in found
    assert flags(job, start=tmp_path / "base")["pretrained-checkpoint"] == [str(tmp_path / "base")]
    # The null tokenizer counts its last id differently from 0.18 on.
    assert flags(job, (0, 17))["vocab-size"] == ["256"]
    assert (flags(job, (0, 18))["vocab-size"], flags(job, (0, 18))["null-tokenizer-eod-id"]) == (["257"], ["256"])
    own = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tok"]
    assert flags(job, own=own)["tokenizer-type"] == ["HuggingFaceTokenizer"]
    assert "vocab-size" not in flags(job, own=own)
    assert stock.data_arguments(job)["train"] == ["0.3", str(tmp_path / "a"), "0.7", str(tmp_path / "b")]
    with_blank = stock_run("dense", tmp_path, [(tmp_path / "with blank", 1.0), (tmp_path / "unused", 0.0)])
    assert stock.data_arguments(with_blank) == {"train": [str(tmp_path / "with blank")], "valid": None, "test": None}


def test_own_flags_are_passed_on_unless_they_contradict():
    assert stock.own_arguments("--num-workers 4 \\\n --overlap-grad-reduce") == ["--num-workers", "4", "--overlap-grad-reduce"]
    for text, message in {
        "--lr 1e-3": r"--lr is decided by train.lr. Set it there",
        "--tensor-model-parallel-size=4": r"--tensor-model-parallel-size is decided by parallel.tensor",
        "--no-save-optim": r"--no-save-optim is decided by the launcher",
        "--eod-mask-loss": r"--eod-mask-loss needs the tokenizer's end of documents; give --tokenizer-type",
        "--rotary-interleaved": r"--rotary-interleaved makes another function of the weights, and no model of a study has it",
        "--window-size 128 0": r"--window-size makes another function",
        "--moe-router-score-function=sigmoid": r"--moe-router-score-function makes another function",
        "--apply-layernorm-1p": r"--apply-layernorm-1p makes another function",
        "--layernorm-zero-centered-gamma": r"--layernorm-zero-centered-gamma makes another function",
        "--use-rotary-position-embeddings": r"decided by model.position_embedding_type",
        "--mtp-num-layers 1": r"--mtp-num-layers makes a model with other weights than any model of a study has",
        "--moe-shared-expert-intermediate-size=64": r"--moe-shared-expert-intermediate-size makes a model with other weights",
        "--step-batch-size-schedule 0:8": r"decided by train.global_batch_size",
        "4 --num-workers": r"begins with '4', expected an option",
        "--a 'b": r"cannot be read as a shell would \(No closing quotation\)",
    }.items():
        with pytest.raises(ConfigError, match=message):
            stock.own_arguments(text)
    stock.own_arguments("--eod-mask-loss --tokenizer-type HuggingFaceTokenizer")


def test_checkouts(tmp_path, monkeypatch):
    assert Checkout.open(fake_checkout(tmp_path / "a")).version == (0, 16)
    with pytest.raises(ConfigError, match=r"no Megatron-LM there .* Give the folder that holds pretrain_gpt.py"):
        Checkout.open(tmp_path)
    message = r"is Megatron-LM 0.12; supported are 0.15 \(core_v0.15.3\), .*0.19 \(core_v0.19.0\).* or set trainer.backend"
    with pytest.raises(ConfigError, match=message):
        Checkout.open(fake_checkout(tmp_path / "b", "0.12.1"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.4.6")
    with pytest.raises(
        ConfigError, match=r"Megatron-LM 0.15 cannot save with NumPy 2.4.6. Install 'numpy<2', or check out core_v0.16"
    ):
        Checkout.open(fake_checkout(tmp_path / "c", "0.15.3"))
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    with pytest.raises(ConfigError, match=r"Megatron-LM 0.19 needs Python 3.12, and this is"):
        Checkout.open(fake_checkout(tmp_path / "d", "0.19.0"))
    with pytest.raises(ConfigError, match=r"trainer.script mine.py: .*mine.py does not exist"):
        Checkout.open(tmp_path / "a").script(Path("mine.py"))


def test_a_study_that_cannot_start(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(STUDY)
    study = str(tmp_path / "study.yaml")
    assert main(["plan", study, "--backend", "megatron_lm"]) == 2
    assert "trainer: backend megatron_lm needs `checkout`" in capsys.readouterr().err


def test_a_seed_that_megatron_lm_refuses(study, capsys):
    assert run(study, "", "--dry-run", "--set", "seed=0") == 2
    assert "seed is 0, and Megatron-LM (trainer.backend) takes seeds of 1 or more" in capsys.readouterr().err


def test_lines_of_its_log():
    line = (
        " [2025-11-25 17:58:21.211845] iteration        2/       8 | consumed samples:           16 | elapsed time per "
        "iteration (ms): 73.3 | throughput per GPU (TFLOP/s/GPU): 1.5 | learning rate: 8.535534E-03 | global batch size:     8 "
        "| lm loss: 5.966925E+00 | load_balancing_loss: 1.0E+00 | loss scale: 1.0 | grad norm: 1.138 | number of skipped "
        "iterations:   0 | number of nan iterations:   0 |\n"
    )
    found = parse_iteration(line)
    assert found is not None
    assert found.row == {"iteration": 2, "lm loss": 5.966925, "learning-rate": 0.008535534, "grad-norm": 1.138}
    assert found.seconds == pytest.approx(0.0733)
    assert parse_iteration("iteration 2 of 8") is None
    assert parse_iteration("[after training is done] datetime: 2026-11-25") is None


@pytest.fixture
def study(tmp_path) -> Path:
    write_texts(tmp_path, "code", "english")
    (tmp_path / "study.yaml").write_text(STUDY)
    embedding = {"embedding.word_embeddings.weight": torch.zeros(384, 8)}  # of the tokenizer's 257 ids, padded
    write_checkpoint(tmp_path / "base" / "iter_0000100", small_model(0) | embedding)
    (tmp_path / "base" / "latest_checkpointed_iteration.txt").write_text("200")  # the study starts from an earlier one
    fake_checkout(tmp_path / "Megatron-LM")
    return tmp_path / "study.yaml"


def run(study: Path, how: str = "", *more: str) -> int:
    settings = ["checkout=Megatron-LM", f"script={TESTS / 'stand_in_pretrain.py'}", f"args=--stand-in {how}"]
    options = [word for s in settings for word in ("--set", f"trainer.{s}")]
    return main(["train", str(study), "--runs", str(study.parent / "runs"), "--backend", "megatron_lm", *options, *more])


def work(study: Path, domain: str = "code") -> Path:
    (found,) = study.parent.glob(f"runs/s/components/.{domain}-*.work")
    return found


def test_a_run_that_ends_early_is_incomplete_and_goes_on(study, capsys, caplog):
    assert run(study, "early") == 75
    said = "its process ended without an error after iteration 4 of 8, by what it has saved in"
    assert said in capsys.readouterr().err
    # The newest checkpoint is damaged: the one before it is resumed from.
    (newest,) = (work(study) / "iter_0000004").glob("*.distcp")
    newest.write_bytes(newest.read_bytes()[:-200])
    shutil.copytree(work(study) / "iter_0000002", work(study) / "iter_0000006")
    (work(study) / "iter_0000006" / ".metadata").unlink()  # a save that was interrupted
    (work(study) / "latest_checkpointed_iteration.txt").write_text("")  # and a tracker that was about to be written
    assert run(study, "early") == 75  # english ends early; code is done
    assert "iter_0000004 is damaged" in caplog.text
    assert run(study, "early") == 0
    (done,) = study.parent.glob("runs/s/components/code-*")
    assert sorted(p.name for p in done.iterdir()) == [
        "iter_0000008",
        "latest_checkpointed_iteration.txt",
        "losses.jsonl",
        "manifest.json",
    ]
    rows = read_losses(done / "losses.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    assert rows[0] == {"iteration": 1, "lm loss": 4.9, "learning-rate": 0.001, "grad-norm": 1.25}
    run_folder = study.parent / "runs" / "s"
    events = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    heard = [e for e in events if e["event"] == "iteration" and e["name"] == "components/code"]
    assert [e["iteration"] for e in heard] == [2, 4, 4, 6, 8]
    assert heard[0]["tokens_per_s"] == pytest.approx(4 * 16 / 0.02)
    (log,) = run_folder.glob("logs/components.code-*.log")
    (start,) = run_folder.glob("logs/components.code-*.start")
    assert f"starting after iteration 2, with {start}" in log.read_text()
    assert (start / "release").resolve() == study.parent / "base" / "iter_0000100"


def test_nothing_is_started_that_could_not_be_listened_to(study, capsys):
    assert run(study, "early") == 75
    before = sorted(p.name for p in work(study).iterdir())
    (work(study) / "losses.jsonl").write_bytes(b"\xff\n")
    assert run(study, "early") == 7
    assert "losses.jsonl line 1: not JSON" in capsys.readouterr().err
    assert sorted(p.name for p in work(study).iterdir()) == before


def test_a_refused_checkpoint_is_not_deleted(tmp_path):
    folder = write_checkpoint(tmp_path / "iter_0000002", {"w": torch.zeros(2)})
    (folder / ".metadata").write_bytes(pickle.dumps(Fraction(1, 2)))
    with pytest.raises(UnsafeInput, match=r"iter_0000002/\.metadata: refused, its pickle names 'fractions\.Fraction'"):
        settle(tmp_path, "code")
    assert (folder / ".metadata").exists()


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path):
    folder = write_checkpoint(tmp_path / "iter_0000002", {"w": torch.zeros(2)})
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    with (
        mock.patch.object(Path, "read_bytes", side_effect=stale),
        pytest.raises(
            StageFailed, match=r"\.metadata: cannot be read \(Stale file handle\)\. Nobody knows whether it is damaged"
        ),
    ):
        settle(tmp_path, "code")
    assert settle(tmp_path, "code") == 2
    (folder / ".metadata").write_bytes(b"")
    assert settle(tmp_path, "code") == 0
    assert (tmp_path / ".damaged-iter_0000002" / ".metadata").exists()


def test_checkpoints_that_are_averaged_stay(study, capsys):
    average = ("--set", "component.average=[0.375, 0.75]")
    assert run(study, "plain", *average) == 2
    assert (
        "the checkpoint of iteration 3 has to stay (component.average or search.extrapolate), but Megatron-LM saves every 2"
        in capsys.readouterr().err
    )
    average = ("--set", "component.average=[0.25, 0.5, 0.75]")
    assert run(study, "plain", *average) == 0
    (done,) = study.parent.glob("runs/s/components/code-*")
    assert sorted(p.name for p in done.glob("iter_*")) == ["iter_0000002", "iter_0000004", "iter_0000006"]
    assert len(read_losses(done / "losses.jsonl")) == 6
    (script,) = study.parent.glob("runs/s/logs/components.code-*.sh")
    assert "--train-iters 6" in script.read_text()
    assert "--lr-decay-iters 8" in script.read_text()
    (mean,) = study.parent.glob("runs/s/averages/components/code-*")
    # The stand-in saves the base again and again.
    base, averaged = (read_checkpoint(p) for p in (study.parent / "base" / "iter_0000100", mean / "average" / "release"))
    assert all(bits(base[key]) == bits(averaged[key]) for key in base)


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("16", 16, "met a result that it could not repeat"),
        ("17", 17, "results that are wrong or cannot be repeated"),
        ("1", 8, "a rank ended with exit code 1"),
        ("nan", 9, "loss is nan at iteration 3"),
    ],
)
def test_how_it_ends_is_how_demix_ends(study, capsys, how, code, message):
    assert run(study, how) == code
    assert message in capsys.readouterr().err


def test_dry_run_prints_the_commands_and_writes_none(study, capsys):
    assert run(study, "", "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.count("exec torchrun --nproc-per-node 1") == 2
    assert f"export PYTHONPATH={study.parent / 'Megatron-LM'}" in said
    assert "--vocab-size ..." in said
    assert not list(study.parent.glob("runs/s/logs/*.sh"))


def test_the_shown_command_is_one_that_a_shell_reads(tmp_path):
    import subprocess

    trainer = TrainerSpec(backend="megatron_lm", checkout=fake_checkout(tmp_path / "with blank"), args="--num-workers 4")
    text = shown_command(stock_run("experts", tmp_path), trainer, tmp_path / "x.json")
    assert "--nproc-per-node 4" in text
    assert text.endswith("--num-workers 4\n")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
