"""Scores do not depend on the layout, nor on merging in memory or reading from disk: real torchrun, gloo ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from task_files import write_all, write_lines

from megatron_demix.artifact import write_json
from megatron_demix.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_demix.evaluate.ensemble import Ensemble
from megatron_demix.evaluate.job import EvaluateJob, evaluate
from megatron_demix.evaluate.scores import ScoreTable
from megatron_demix.evaluate.windows import read_windows
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.study.data import TokenizerSpec
from megatron_demix.study.search import TaskSpec
from megatron_demix.train.job import TrainJob
from megatron_demix.train.trainer import train

TIME_LIMIT_S = 600
MIXTURES = {"even": {"a": 0.5, "b": 0.5}, "only_a": {"a": 1.0, "b": 0.0}, "skewed": {"a": 0.2, "b": 0.8}}
# Whether an answer passes depends on its every character, so equal scores mean equal texts.
WRITES = [
    {
        "prompt": f"{word} = r'''",
        "entry_point": word,
        "canonical_solution": "x",
        "test": f"'''\ndef check(text):\n    assert len(text) >= 7\n    assert sum(map(ord, text)) % 2 == {odd}",
    }
    for word, odd in (("one", 0), ("import_", 1), ("selfish", 0))
]


def trained(folder: Path, make_train_job, byte_corpus, model: dict) -> tuple[TrainJob, dict[str, Path]]:
    """A base, and two components from it."""
    base = make_train_job(folder / "base", name="base", model=model, train_iters=2)
    train(base)
    components = {}
    for name in ("a", "b"):
        job = make_train_job(
            folder / name, name=name, model=model, train_iters=3, init_checkpoint=base.work, blend=[(byte_corpus[name], 1.0)]
        )
        train(job)
        components[name] = job.work
    return base, components


@pytest.fixture(scope="module")
def parts(tmp_path_factory, make_train_job, byte_corpus):
    """Two components from one base, their merges on disk, and a job that scores both kinds."""
    folder = tmp_path_factory.mktemp("evaluate")
    base, components = trained(folder, make_train_job, byte_corpus, {"qk_layernorm": True})
    merge_checkpoints(components, MIXTURES, folder / "proxies", progress=False)
    train_tokenizer(TokenizerSpec(type="byte"), {}, folder / "tokenizer")
    tasks = write_all(folder / "tasks")
    job = EvaluateJob(
        model=base.model,
        train=base.train,
        parallel=base.parallel,
        vocab_size=base.vocab_size,
        token_bytes=[1] * 256 + [0],
        domains={"a": [byte_corpus["a"]], "b": [byte_corpus["b"]]},
        tokens_per_domain=32 * 11,  # 11 windows: the last micro-batch of 4 is not full
        tasks=[
            TaskSpec(name="arc", format="arc", path=tasks["arc"], split="validation", num_shots=1),
            TaskSpec(name="blanks", format="winogrande", path=tasks["winogrande"], split="validation"),
            TaskSpec(
                name="writes", format="humaneval", path=write_lines(folder / "w.jsonl", WRITES), split="test", max_new_tokens=8
            ),
        ],
        tokenizer=folder / "tokenizer",
        micro_batch_size=4,
        components=components,
        mixtures=MIXTURES,
        keep_tokens=["skewed", "component_a"],
        checkpoints={f"disk_{name}": folder / "proxies" / name for name in MIXTURES} | {"component_a": components["a"]},
        work=folder / "scores",
    )
    return folder, job


@pytest.fixture(scope="module")
def reference(parts) -> dict:
    """All scores from one rank in this process."""
    _, job = parts
    job.work.mkdir()
    evaluate(job, ProxyMerger, load_tokenizer)
    return ScoreTable.read(job.work / "scores.json").rows


def test_memory_and_disk_are_the_same_model(reference):
    assert list(reference) == [*MIXTURES, *(f"disk_{name}" for name in MIXTURES), "component_a"]
    for name in MIXTURES:
        assert reference[name] == reference[f"disk_{name}"]
    assert reference["only_a"] == reference["component_a"]
    assert len({tuple(reference[name].values()) for name in MIXTURES}) == 3


FRESH = """
import sys
from megatron_demix.evaluate.job import EvaluateJob, evaluate
evaluate(EvaluateJob.model_validate_json(open(sys.argv[1]).read()), None)
from megatron.core.jit import jit_fuser
assert jit_fuser(len) is len
"""


def test_a_process_that_only_scores_imports_the_core_without_its_compiler(parts, tmp_path):
    """Which fails on a CPU, in the routers of mixtures of experts."""
    _, job = parts
    nothing = {"mixtures": {}, "checkpoints": {}, "tasks": [], "keep_tokens": [], "work": tmp_path}
    (tmp_path / "job.json").write_text(job.model_copy(update=nothing).model_dump_json())
    done = subprocess.run([sys.executable, "-c", FRESH, tmp_path / "job.json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_ensemble_of_one_is_that_model(parts, reference):
    _, job = parts
    found = Ensemble(job.work / "tokens", job.keep_tokens).scores(np.eye(2))
    assert set(found) == set(reference["skewed"]) - {"writes/pass@1"}
    for m, name in enumerate(job.keep_tokens):
        assert {score: values[m] for score, values in found.items()} == pytest.approx(
            {score: reference[name][score] for score in found}, rel=1e-12
        )


def test_tasks_are_columns_of_the_table(parts, reference):
    _, job = parts
    table = ScoreTable.read(job.work / "scores.json")
    assert [(s.name, s.unit, s.direction) for s in table.scores][2:] == [
        ("arc/acc", "fraction", "higher"),
        ("arc/acc_norm", "fraction", "higher"),
        ("arc/bits_per_byte", "bits/byte", "lower"),
        ("blanks/acc", "fraction", "higher"),
        ("blanks/acc_norm", "fraction", "higher"),
        ("blanks/bits_per_byte", "bits/byte", "lower"),
        ("writes/pass@1", "fraction", "higher"),
        ("writes/bits_per_byte", "bits/byte", "lower"),
    ]
    notes = json.loads((job.work / "tasks.json").read_text())
    # Every text is longer than the 32 tokens that this model reads.
    assert notes["even"] == {
        "arc": {"items": 4, "cut": 11},
        "blanks": {"items": 2, "cut": 4},
        "writes": {"items": 3, "cut": 0, "endless": 3, "stopped": 0},
    }
    assert 0 < sum(row["writes/pass@1"] for row in reference.values()) < len(reference), "some answers pass, some do not"
    assert len({row["arc/bits_per_byte"] for row in reference.values()}) == 3, "the mixtures differ"


def test_bits_per_byte_against_log_softmax(parts, reference):
    """The same number from the model's logits, added up in float64."""
    from megatron_demix.train.compat import cpu_compat
    from megatron_demix.train.weights import load_weights

    _, job = parts
    windows = read_windows(
        "a",
        job.domains["a"],
        seq_length=32,
        num_tokens=job.tokens_per_domain,
        token_bytes=np.array(job.token_bytes),
        vocab_size=job.vocab_size,
    )
    with cpu_compat():
        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel

        initialize_parallel(job.parallel, seed=1, timeout_s=60)
        model = build_model(job.model, job.train, job.parallel, job.vocab_size).eval()
        load_weights(model, job.checkpoints["component_a"])
        tokens = torch.from_numpy(windows.tokens)
        with torch.no_grad():
            logits = model(tokens[:, :-1], torch.arange(32).expand(len(tokens), -1), None)
        destroy_parallel()
    log_p = torch.log_softmax(logits.double(), -1).gather(-1, tokens[:, 1:, None])
    expected = -log_p.sum().item() / math.log(2) / windows.target_bytes
    assert reference["component_a"]["a"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layout", [{"tensor": 2, "pipeline": 2}, {"data": 2}], ids=["tp2pp2", "dp2"])
def test_every_layout_scores_alike(parts, reference, layout):
    folder, job = parts
    work = folder / "-".join(layout)
    work.mkdir()
    # An odd number of checkpoints, which two replicas cannot share evenly.
    checkpoints = {name: path for name, path in job.checkpoints.items() if name != "disk_even"}
    spread = job.model_copy(
        update={"work": work, "parallel": job.parallel.model_copy(update=layout), "checkpoints": checkpoints}
    )
    write_json(folder / "job.json", spread.model_dump(mode="json"))
    # What a killed run left: one whole row, which is not measured again, and one cut short, which is.
    row = {"model": "even", "scores": reference["even"] | {"a": 1.0, "b": 2.0}, "notes": {}}
    (work / "rows-all-0.jsonl").write_text(f'\n{json.dumps(row)}\n\n{{"model": "only_a", "sco')
    # On a file system that machines share, other ranks may not see them yet.
    program = [str(Path(__file__).parent / "run_evaluate_job.py")]
    torchrun(folder / "job.json", ranks=spread.parallel.world_size, program=program)
    rows = ScoreTable.read(work / "scores.json").rows
    assert list(rows) == [name for name in reference if name != "disk_even"]
    assert rows.pop("even") == row["scores"]
    for model, row in rows.items():
        assert row == pytest.approx(reference[model], rel=2e-6), model
    assert not list(work.glob("rows-*"))
    # Every token's probability, too.
    assert (work / "tokens" / "texts.json").read_text() == (job.work / "tokens" / "texts.json").read_text()
    for name in job.keep_tokens:
        tokens, expected = (np.load(at / "tokens" / f"{name}.npy") for at in (work, job.work))
        assert tokens == pytest.approx(expected, rel=2e-4, abs=2e-5)


def test_experts_are_shared_out_among_ranks(parts, make_train_job, byte_corpus, tmp_path):
    """Two replicas of two ranks each score as one rank does, written answers included."""
    _, dense = parts
    base, components = trained(tmp_path, make_train_job, byte_corpus, {"num_experts": 4, "moe_ffn_hidden_size": 32})
    (tmp_path / "alone").mkdir()
    job = dense.model_copy(
        update={
            "model": base.model,
            "train": base.train,
            "components": components,
            "checkpoints": {"component_a": components["a"]},
            "keep_tokens": [],
            "work": tmp_path / "alone",
        }
    )
    evaluate(job, ProxyMerger, load_tokenizer)
    spread = job.model_copy(
        update={
            "work": tmp_path / "shared",
            "parallel": job.parallel.model_copy(update={"data": 4, "expert": 2}),
            "generate_batch_size": 2,
        }
    )
    spread.work.mkdir()
    write_json(tmp_path / "job.json", spread.model_dump(mode="json"))
    torchrun(tmp_path / "job.json", ranks=4)
    alone, shared = (ScoreTable.read(at.work / "scores.json").rows for at in (job, spread))
    assert list(shared) == [*MIXTURES, "component_a"]
    assert len({row["arc/bits_per_byte"] for row in alone.values()}) == 3
    for name, row in shared.items():
        assert row == pytest.approx(alone[name], rel=2e-6), name


def test_ranks_wait_for_one_that_scores_for_longer_than_a_collective_may_take(parts, tmp_path):
    """A program's test sleeps: the other rank of its model waits, and the other replica, before a load and at the end."""
    _, job = parts
    slow = WRITES[0] | {"test": "'''\nimport time\ndef check(text):\n    time.sleep(50)"}
    path = write_lines(tmp_path / "slow.jsonl", [slow])
    spread = job.model_copy(
        update={
            "work": tmp_path / "scores",
            "parallel": job.parallel.model_copy(update={"tensor": 2, "data": 2}),
            "train": job.train.model_copy(update={"timeout": 40}),
            "tasks": [TaskSpec(name="slow", format="humaneval", path=path, split="test", max_new_tokens=8, timeout=150)],
            "mixtures": {"even": MIXTURES["even"]},
            "checkpoints": {"disk_even": job.checkpoints["disk_even"]},
            "keep_tokens": [],
        }
    )
    spread.work.mkdir()
    write_json(tmp_path / "job.json", spread.model_dump(mode="json"))
    torchrun(tmp_path / "job.json", ranks=4)
    rows = ScoreTable.read(spread.work / "scores.json").rows
    assert {row["slow/pass@1"] for row in rows.values()} == {1.0}


def test_a_run_that_was_killed_before_it_was_published_scores_nothing_again(parts, reference, monkeypatch):
    _, job = parts
    monkeypatch.setattr("megatron_demix.train.model.build_model", None)
    written = {name: (job.work / name).read_bytes() for name in ("scores.json", "tasks.json")}
    for model in ("even", "only_a"):  # some rows were removed before the kill
        row = {"model": model, "scores": reference[model], "notes": json.loads(written["tasks.json"])[model]}
        (job.work / f"rows-all-{model}.jsonl").write_text(f"\n{json.dumps(row)}\n")
    evaluate(job, ProxyMerger, load_tokenizer)
    assert {name: (job.work / name).read_bytes() for name in written} == written
    assert not list(job.work.glob("rows-*"))


def test_ranks_end_with_the_error_s_code(parts):
    folder, job = parts
    broken = job.model_copy(update={"work": folder, "vocab_size": 100, "token_bytes": [1] * 100})
    write_json(folder / "broken.json", broken.model_dump(mode="json"))
    output = torchrun(folder / "broken.json", ranks=1, expected=3)
    assert "error (rank 0): domain 'a': token id 256" in output
    assert "Traceback" not in output


def test_the_job_is_plain_json(parts):
    _, job = parts
    assert EvaluateJob.model_validate(json.loads(job.model_dump_json())) == job


def torchrun(
    job: Path, *, ranks: int, expected: int = 0, program: Sequence[str] = ("-m", "megatron_demix.pipeline.worker")
) -> str:
    command = [sys.executable, "-m", "megatron_demix.launch.ranks", "--standalone", f"--nproc-per-node={ranks}"]
    command += [*program, str(job)]
    process = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=TIME_LIMIT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert process.returncode == expected, process.stdout[-4000:]
    return process.stdout
