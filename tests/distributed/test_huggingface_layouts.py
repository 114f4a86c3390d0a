"""An imported model scores the same at every layout, and as transformers scores it: real torchrun, gloo ranks."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_demix.artifact import write_json
from megatron_demix.evaluate.job import EvaluateJob
from megatron_demix.evaluate.scores import ScoreTable
from megatron_demix.evaluate.windows import read_windows
from megatron_demix.huggingface.importing import Layout, import_folder
from megatron_demix.study.training import ModelSpec, ParallelSpec

transformers = pytest.importorskip("transformers")

VOCAB, SEQUENCE, WINDOWS = 384, 32, 8  # a multiple of 128: padding would take part in the softmax of one side only
TIME_LIMIT_S = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("hf")
    transformers.Qwen3ForCausalLM(config).eval().save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 2)], ids=["tp2pp2"])
def test_scores_of_an_import(folder, byte_corpus, make_train_job, tensor, pipeline):
    model = import_folder(
        folder / "model", folder / "base", layout=Layout(tensor, pipeline), transformer_impl="local", progress=False
    )
    job = EvaluateJob(
        model=ModelSpec(**model.study()),
        train=make_train_job(folder).train,
        parallel=ParallelSpec(tensor=tensor, pipeline=pipeline),
        vocab_size=VOCAB,
        token_bytes=[1] * 256 + [0] * 128,
        domains={"a": [byte_corpus["a"]]},
        tokens_per_domain=SEQUENCE * WINDOWS,
        micro_batch_size=4,
        checkpoints={"imported": folder / "base"},
        work=folder / "scores",
    )
    job.work.mkdir()
    write_json(folder / "job.json", job.model_dump(mode="json"))
    command = [sys.executable, "-m", "megatron_demix.launch.ranks", "--standalone", f"--nproc-per-node={tensor * pipeline}"]
    process = subprocess.run(
        [*command, "-m", "megatron_demix.pipeline.worker", str(folder / "job.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=TIME_LIMIT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:]

    windows = read_windows(
        "a",
        job.domains["a"],
        seq_length=SEQUENCE,
        num_tokens=job.tokens_per_domain,
        token_bytes=np.array(job.token_bytes),
        vocab_size=VOCAB,
    )
    tokens = torch.from_numpy(windows.tokens)
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")(tokens[:, :-1]).logits
    log_p = torch.log_softmax(logits.double(), -1).gather(-1, tokens[:, 1:, None])
    expected = -log_p.sum().item() / math.log(2) / windows.target_bytes
    assert ScoreTable.read(job.work / "scores.json").rows["imported"]["a"] == pytest.approx(expected, rel=1e-5)
