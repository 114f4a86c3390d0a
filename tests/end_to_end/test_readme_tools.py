"""The README's commands for one's own checkpoints and data, run as they stand there, on small files."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dist_checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOMAINS = ("general", "code", "math")


@pytest.fixture
def place(tmp_path):
    """An empty folder with the repository's tools in it."""
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    return tmp_path


def run_block(title: str, place: Path, **replaced: str) -> str:
    """Run the shell block below the paragraph that begins with **title.** Returns what it printed."""
    block = re.search(rf"^\*\*{title}\.\*\*.*?```bash\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    assert block
    script = block[1]
    for old, new in replaced.items():
        assert old in script
        script = script.replace(old, new)
    # Several small programs: threads of linear algebra libraries would only fight over the processors.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", "-euxc", script], cwd=place, env=environment, capture_output=True, text=True, timeout=800
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_merging(place):
    layers = {
        name: torch.full((4, 6), value, dtype=torch.bfloat16) for name, value in zip(DOMAINS, (1.0, 2.0, 4.0), strict=True)
    }
    for name, layer in layers.items():
        write_checkpoint(place / "ckpt" / name, {"decoder.weight": layer}, common={"iteration": 7})
    mixtures = [{"name": n, "weights": dict.fromkeys(DOMAINS, 0.0) | {n: 1.0}} for n in DOMAINS]
    (place / "weights.jsonl").write_text("".join(json.dumps(m) + "\n" for m in mixtures))
    shown = run_block("Merge checkpoints", place)
    assert "decoder.weight" in shown
    assert (place / "ckpt/proxy/latest_checkpointed_iteration.txt").read_text() == "release"
    assert sorted(p.name for p in (place / "proxies").iterdir() if not p.name.startswith(".")) == sorted(DOMAINS)


def test_searching(place):
    (place / "domains.yaml").write_text(
        "domains: {code: {tokens: 30B, max_epochs: 4}, math: {tokens: 10B, max_epochs: 4}}\n"
        "target_tokens: 50B\nanchor: {mixture: uniform, share: 0.5}\n"
    )
    block = re.search(r"python tools/search_mixture\.py sample .*", README)
    assert block
    sample = block[0].replace("python", sys.executable, 1).replace("--num 64", "--num 16")
    subprocess.run(sample.split(), cwd=place, check=True, timeout=400)
    header, *rows = [line.split(",") for line in (place / "shares.csv").read_text().splitlines()]
    assert header == ["shares", "code", "math"]
    losses = [(i, -math.log(float(code)), -math.log(float(maths))) for i, code, maths in rows]
    for name, more in (("scores", 0.0), ("proxies", 0.0), ("references", 0.3), ("again", 0.301)):
        lines = [f"{i},{code + more:.6f},{maths + more:.6f}" for i, code, maths in losses]
        (place / f"{name}.csv").write_text("\n".join(["id,code,math", *lines]) + "\n")
    run_block("Search with your own scores", place, **{"--num 64": "--num 16"})
    # -2 log(code) - log(math) is least at two to one.
    assert json.loads((place / "mixture.json").read_text())["weights"]["code"] == pytest.approx(2 / 3, abs=0.03)
    assert len(rows) == 16
    assert json.loads((place / "report.json").read_text())


def test_building_data(place):
    from tokenizers import ByteLevelBPETokenizer

    texts = [f"def f{i}(x):\n    return x ** {i} + {i * i}\n" * (1 + i % 7) for i in range(200)]
    (place / "code").mkdir()
    (place / "tokenizer").mkdir()
    (place / "code" / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(place / "tokenizer" / "tokenizer.json"))
    (place / "pool.yaml").write_text("domains: {code: {prefixes: [data/code_text_document], max_epochs: 4}}\n")
    (place / "mixture.json").write_text('{"weights": {"code": 1.0}}')
    (place / "data").mkdir()
    run_block("Build the data", place, **{"20B": "9k"})
    assert (place / "blend" / "found.idx").is_file()
