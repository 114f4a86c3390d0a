"""examples/megatron_lm: the shown difference is the real one, the scripts are bash, Megatron-LM has their flags, and what the
page says to run runs, with a stand-in for sbatch."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from dist_checkpoints import write_checkpoint
from indexed_data import make_indexed

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "megatron_lm"
PAGE = (EXAMPLE / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("before.sbatch", "after.sbatch")
DOMAINS = ("general", "code", "math")


def test_the_shown_difference_is_the_real_one():
    before, after = ((EXAMPLE / name).read_text().splitlines() for name in SCRIPTS)
    real = list(difflib.unified_diff(before, after, lineterm="", n=3))[2:]
    shown = re.search(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    assert shown
    assert shown[1].splitlines() == real
    assert sum(line.startswith(("+", "-")) for line in real) <= 12


def arguments_of(script: Path, folder: Path, **environment: str) -> list[str]:
    """What the script gives pretrain_gpt.py, by running it with stand-ins for SLURM's commands."""
    folder.mkdir(exist_ok=True)
    for name, lines in {"srun": 'shift 2; printf "%s\\n" "$@"', "scontrol": "echo node1"}.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n"} | environment
    subprocess.run(["bash", "-n", script], check=True)
    result = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True)
    words = result.stdout.splitlines()
    return words[next(i for i, word in enumerate(words) if word.endswith("pretrain_gpt.py")) + 1 :]


def test_megatron_lm_has_their_flags(tmp_path):
    known = json.loads((ROOT / "tests" / "contract" / "megatron_lm_options.json").read_text())["all"]
    before = arguments_of(EXAMPLE / "before.sbatch", tmp_path)
    after = arguments_of(EXAMPLE / "after.sbatch", tmp_path)
    assert {word[2:] for word in before if word.startswith("--")} <= set(known)
    named = [word.replace("by_hand.txt", "pretrain.args.txt") for word in before]
    assert after == named
    component = arguments_of(EXAMPLE / "after.sbatch", tmp_path, RUN="code", STEPS="1000", BASE="ckpt/base")
    assert component[component.index("--train-iters") + 1] == "1000"
    assert component[-2:] == ["--pretrained-checkpoint", "ckpt/base"]
    assert "pretrained-checkpoint" in known


def test_what_the_page_says_to_run_runs(tmp_path):
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    example = tmp_path / "examples" / "megatron_lm"
    example.mkdir(parents=True)
    for file in EXAMPLE.iterdir():
        (example / file.name).write_bytes(file.read_bytes())
    for number, name in enumerate(DOMAINS):
        make_indexed(tmp_path / "data" / f"{name}_text_document", [100] * 60, seed=number)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/bash\necho "$RUN ${STEPS:-} $BASE $(head -n 1 blend/$RUN.args.txt)"\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}

    def run(block: str) -> str:
        block = block.replace("2.1B", "2k").replace("84B", "2k").replace("--num 64", "--num 12")
        result = subprocess.run(["bash", "-eu"], input=block, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    train, merge, choose = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    submitted = [line for line in run(train).splitlines() if "_text_document" in line and " 1000 ckpt/base " in line]
    assert [line.split()[0] for line in submitted] == list(DOMAINS)
    for number, name in enumerate(DOMAINS):
        tensors = {"decoder.weight": torch.full((4, 6), float(number), dtype=torch.bfloat16)}
        write_checkpoint(tmp_path / "ckpt" / name, tensors, common={"iteration": 1000})
    run(merge)
    rows = [line.split(",") for line in (tmp_path / "weights.csv").read_text().splitlines()]
    proxies = [row[0] for row in rows[1:]]
    assert len(proxies) == 12
    assert sorted(p.name for p in (tmp_path / "proxies").iterdir() if not p.name.startswith(".")) == sorted(proxies)
    scores = [f"{name},{2 - float(code)},{3 - float(math)}" for name, _, code, math in rows[1:]]
    (tmp_path / "scores.csv").write_text("\n".join(["id,code,math", *scores]) + "\n")
    assert "found  ckpt/base" in run(choose)
    shares = json.loads((tmp_path / "mixture.json").read_text())["weights"]
    assert shares["code"] > shares["general"]


def test_the_study_section_on_the_page_is_one():
    from megatron_demix.study.training import TrainerSpec
    from megatron_demix.train.megatron_lm.arguments import own_arguments

    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    trainer = TrainerSpec.model_validate(yaml.safe_load(block)["trainer"])
    assert "--num-workers" in own_arguments(trainer.args)
