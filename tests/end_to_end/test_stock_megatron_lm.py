"""Stock Megatron-LM accepts and runs what we write, and reads what we merge. MEGATRON_LM names a checkout; on a machine without
CUDA megatron_lm_on_cpu.py runs it. benchmarks/megatron_lm.py runs this for every supported version."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from indexed_data import make_indexed
from stock_runs import RUNS, stock_run
from train_runs import FAMILIES, stop_in_iteration

from megatron_demix.artifact import write_json
from megatron_demix.cli import main
from megatron_demix.errors import Incomplete
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.study.training import TrainerSpec
from megatron_demix.train.losses import read_losses
from megatron_demix.train.megatron_lm.arguments import data_arguments, pretrain_arguments
from megatron_demix.train.megatron_lm.checkout import Checkout
from megatron_demix.train.megatron_lm.log import parse_iteration
from megatron_demix.train.megatron_lm.run import StockJob, alone

LAUNCHER = Path(__file__).parents[1] / "megatron_lm_on_cpu.py"
pytestmark = pytest.mark.skipif("MEGATRON_LM" not in os.environ, reason="MEGATRON_LM names no checkout of Megatron-LM")

STUDY = """
name: stock
tokenizer: {type: byte}
prepare: {split: [0.8, 0.1, 0.1]}
domains:
  - {name: code, inputs: ["corpus/code.jsonl"], max_epochs: 8}
  - {name: english, inputs: ["corpus/english.jsonl"], max_epochs: 8}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2}
train: {seq_length: 64, micro_batch_size: 4, global_batch_size: 8, lr: 1e-2, precision: fp32, save_interval: 4, log_interval: 4}
base: {tokens: 4096}
component: {maturity_seeds: 0, tokens: 8192}                 # 16 steps
search: {rounds: [8], objective: {code: 1, english: 1}, bootstraps: 0}
final: {tokens: 4096}
"""


@pytest.fixture(scope="module")
def checkout() -> Checkout:
    return Checkout.open(Path(os.environ["MEGATRON_LM"]))


def launch(checkout: Checkout, *arguments: str) -> str:
    """What one rank of Megatron-LM prints."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(checkout.path), str(LAUNCHER.parents[1])]),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        **alone(),
    }
    command = [sys.executable, str(LAUNCHER), *arguments]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-3000:]
    return result.stdout


def test_its_own_parser_accepts_every_kind_of_run(tmp_path, checkout, record_property):
    cases = []
    for kind in RUNS:
        for transformer_engine in (False, True):
            job = stock_run(kind, tmp_path)
            (tmp_path / "data.json").write_text(json.dumps(data_arguments(job)))
            options = {"data": tmp_path / "data.json", "start": tmp_path / "base", "version": checkout.version}
            arguments = pretrain_arguments(job, [], transformer_engine=transformer_engine, **options)
            if job.parallel.context > 1 and not transformer_engine:
                continue  # Megatron-LM has it with Transformer Engine only
            cases.append({"ranks": job.parallel.world_size, "arguments": arguments})
    # A script of one's own, with the hook instead of a file.
    (tmp_path / "pool.yaml").write_text(f"domains: {{a: {{prefixes: [{make_indexed(tmp_path / 'a', [40] * 50)}]}}}}")
    (tmp_path / "mixture.json").write_text('{"weights": {"a": 1}}')
    at = arguments.index("--per-split-data-args-path")
    hooked = [
        *arguments[:at],
        *arguments[at + 2 :],
        "--demix-blend",
        str(tmp_path / "pool.yaml"),
        str(tmp_path / "mixture.json"),
    ]
    cases.append({"ranks": 4, "arguments": [*hooked, "2k"], "train_data_path": ["1", str(tmp_path / "a")]})
    write_json(tmp_path / "cases.json", cases)
    launch(checkout, "--parse", str(tmp_path / "cases.json"))
    record_property("cases", len(cases))
    record_property("options", (tmp_path / "cases.options.json").read_text())


@pytest.fixture(scope="module")
def trained(study_folder, tmp_path_factory, checkout) -> dict[str, Path]:
    """Both backends' runs of one study, from one base: where their components lie."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "corpus").symlink_to(study_folder / "corpus")
    path = folder / "study.yaml"
    path.write_text(STUDY)
    assert main(["train", str(path), "--quiet", "--runs", str(folder / "base")]) == 0
    (base,) = (folder / "base" / "stock" / "base").glob("base-*")
    given = ["--set", f"base={{checkpoint: {base}}}", "--quiet"]
    stock = [f"trainer.checkout={checkout.path}", f"trainer.script={LAUNCHER}"]
    assert main(["train", str(path), *given, "--runs", str(folder / "ours")]) == 0
    options = [word for setting in stock for word in ("--set", setting)]
    assert main(["train", str(path), *given, *options, "--backend", "megatron_lm", "--runs", str(folder / "stock")]) == 0
    return {name: folder / name / "stock" for name in ("ours", "stock")}


def component(run: Path, name: str) -> Path:
    (found,) = (run / "components").glob(f"{name}-*")
    return found


def job_file(run: Path) -> Path:
    (found,) = (p for p in (run / "logs").glob("components.code-*.json") if len(p.suffixes) == 2)
    return found


@pytest.mark.timeout(900)
def test_both_trainers_learn_the_same(trained, checkout, record_property):
    """The same start, batches and schedule give the losses of every step, but for rounding."""
    for name in ("code", "english"):
        ours, stock = (read_losses(component(trained[which], name) / "losses.jsonl") for which in ("ours", "stock"))
        assert [row["iteration"] for row in stock] == list(range(1, 17))
        losses = [row["lm loss"] for row in ours]
        if checkout.version >= (0, 16):  # its second line is the mean of the first two
            losses[1] = (losses[0] + losses[1]) / 2
        gap = max(abs(a - b["lm loss"]) for a, b in zip(losses, stock, strict=True))
        record_property(f"largest difference of a loss, {name}", round(gap, 7))
        assert gap < 1e-4
        # Megatron-LM prints the learning rate of the next step.
        rates = [(a["learning-rate"], b["learning-rate"]) for a, b in zip(ours[1:], stock[:-1], strict=True)]
        assert all(a == pytest.approx(b, rel=1e-5) for a, b in rates)
    events = [json.loads(line) for line in (trained["stock"] / "metrics.jsonl").read_text().splitlines()]
    heard = [e["iteration"] for e in events if e["event"] == "iteration" and e["name"] == "components/code"]
    assert heard == [4, 8, 12, 16]


def test_a_merge_of_its_components_loads_with_a_plain_load(trained, tmp_path, checkout, record_property):
    """Megatron-LM's inspector lists it, and its loss before the first step is ours, on the same batch."""
    components = {name: component(trained["stock"], name) for name in ("code", "english")}
    (merged,) = merge_checkpoints(
        components, {"m": {"code": 0.5, "english": 0.5}}, tmp_path / "merged", progress=False, into_output=True
    )
    inspector = [sys.executable, "tools/checkpoint/checkpoint_inspector.py", "inspect", str(merged / "release")]
    result = subprocess.run(
        inspector, cwd=checkout.path, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stderr
    assert "decoder.layers.mlp.linear_fc1.weight [torch.float32" in result.stdout
    command = StockJob.model_validate_json(job_file(trained["stock"]).read_text()).command[2:]
    for option, value in (("--load", str(merged)), ("--save", str(tmp_path / "again")), ("--train-iters", "1")):
        command[command.index(option) + 1] = value
    command[command.index("--lr-decay-iters") + 1] = "16"
    start_option = command.index("--pretrained-checkpoint")
    del command[start_option : start_option + 2]
    said = launch(checkout, *command)
    assert f"loading release checkpoint from {merged}" in said or "successfully loaded checkpoint" in said
    loss = float(said.split("lm loss: ")[1].split(" ")[0])

    ours = tmp_path / "ours"
    from megatron_demix.train.job import TrainJob
    from megatron_demix.train.trainer import train

    job = TrainJob.model_validate_json(job_file(trained["ours"]).read_text())
    update = {"init_checkpoint": merged, "work": ours, "heartbeat": None, "tensorboard": None, "train_iters": 1}
    train(job.model_copy(update=update))
    expected = read_losses(ours / "losses.jsonl")[0]["lm loss"]
    record_property("difference of the merged model's loss", round(abs(loss - expected), 7))
    assert loss == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_goes_on_with_a_run_of_ours(tmp_path, make_train_job, checkout, family, record_property):
    """From the middle of a run, with its optimizer, schedule and samples, to the losses and gradient norms it has here."""
    from megatron_demix.train.trainer import train

    model = FAMILIES[family] | {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    options = {"lr": 1e-2, "lr_warmup_fraction": 0.3, "lr_decay_style": "WSD", "min_lr": 1e-4}
    job = make_train_job(tmp_path, model=model, train=options, train_iters=10)
    with stop_in_iteration(4), pytest.raises(Incomplete):
        train(job)
    copy = job.model_copy(update={"work": tmp_path / "stock", "index_cache": tmp_path / "stock.index"})
    shutil.copytree(job.work, copy.work)
    train(job)
    (tmp_path / "data.json").write_text(json.dumps(data_arguments(copy)))
    arguments = pretrain_arguments(
        copy, [], data=tmp_path / "data.json", start=None, version=checkout.version, transformer_engine=False
    )
    stock = [found.row for line in launch(checkout, *arguments).splitlines() if (found := parse_iteration(line))]
    ours = read_losses(job.work / "losses.jsonl")[4:]
    assert [row["iteration"] for row in stock] == [row["iteration"] for row in ours] == list(range(5, 11))
    losses = [row["lm loss"] for row in ours]
    if checkout.version >= (0, 16):  # its second line is the mean of the first two
        losses[1] = (losses[0] + losses[1]) / 2
    gap = max(abs(a - b["lm loss"]) for a, b in zip(losses, stock, strict=True))
    record_property(f"largest difference of a loss after resuming, {family}", round(gap, 7))
    assert gap < 1e-5
    for a, b in zip(ours, stock, strict=True):
        assert b["grad-norm"] == pytest.approx(a["grad-norm"], abs=6e-4)  # printed with three digits


def test_stopped_on_two_ranks_it_saves_and_goes_on(study_folder, tmp_path, checkout):
    """SIGTERM to `demix train`: Megatron-LM saves and ends with 0, demix with 75. Then it is finished, every line once."""
    (tmp_path / "corpus").symlink_to(study_folder / "corpus")
    text = STUDY.replace("base: {tokens: 4096}", "base: {tokens: 60k}") + "parallel: {data: 2}\n"
    (tmp_path / "study.yaml").write_text(text.replace("save_interval: 4", "save_interval: 1000"))
    script = TrainerSpec(backend="megatron_lm", checkout=checkout.path, script=LAUNCHER)
    settings = [f"trainer.{k}={getattr(script, k)}" for k in ("backend", "checkout", "script")]
    command = [sys.executable, "-m", "megatron_demix.cli", "run", "study.yaml", "--set", "domains.0.max_epochs=1000"]
    command += ["--set", "domains.1.max_epochs=1000", *(w for s in settings for w in ("--set", s))]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    losses: list[Path] = []
    while not (losses and losses[0].read_text().count("\n") >= 3):
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.2)
        losses = list(tmp_path.glob("runs/stock/base/.base-*.work/losses.jsonl"))
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=400)[1]
    assert running.returncode == 75, said
    saved = int((losses[0].parent / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < 117
    assert main(["train", str(tmp_path / "study.yaml"), "--quiet", "--runs", str(tmp_path / "runs"), *command[5:]]) == 0
    (base,) = (tmp_path / "runs" / "stock" / "base").glob("base-*")
    assert [row["iteration"] for row in read_losses(base / "losses.jsonl")] == list(range(1, 118))
