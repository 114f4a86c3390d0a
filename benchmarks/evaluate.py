#!/usr/bin/env python3
"""What scoring a model on tasks costs, against plain forward passes of the same texts: one thread of a CPU.

python benchmarks/evaluate.py [--repeat 2] [--output benchmarks/results/evaluate.json]

The model is a GPT of random weights (hidden 256, 6 layers, 4096 ids, float32). The texts are random ids in the shape of public
tasks: questions of 10 to 120 tokens with 2 or 4 options of 1 to 40 tokens, alone or behind five worked examples. The plain pass
runs each whole text, sorted by length and filled up to the longest of its batch, with the output layer at every position: what
scoring without a cache does. An evaluated token is one of a text that was scored, however often it had to be run. Generation is
48 new tokens behind each question; the plain way runs whole texts again for every one of them, on a few of the questions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

VOCABULARY, LENGTH, BATCH_TOKENS = 4096, 1024, 8192
SHAPES = {
    # name: (questions, options, tokens of an option, tokens of five worked examples)
    "4 short options (ARC)": (40, 4, (1, 8), 0),
    "4 short options, 5 examples": (16, 4, (1, 8), 300),
    "4 long options (HellaSwag)": (40, 4, (10, 40), 0),
    "4 long options, 5 examples": (8, 4, (10, 40), 500),
    "2 options (PIQA)": (40, 2, (5, 40), 0),
}
NEW_TOKENS, GENERATED, REPEATED = 48, 32, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "evaluate.json")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rows = measure(arguments.repeat)
    for title in rows[0]:
        print(f"{title:>28}", *(f"{shown(row.get(title)):>30}" for row in rows), flush=True)
    machine = {"cpus": os.cpu_count(), "load before": round(load, 1)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/evaluate.py --repeat {arguments.repeat}"
    arguments.output.write_text(json.dumps({"command": command, "machine": machine, "rows": rows}, indent=1) + "\n")


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measure(repeat: int) -> list[dict[str, Any]]:
    import torch

    from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec
    from megatron_demix.train.compat import cpu_compat

    torch.set_num_threads(1)
    with cpu_compat():
        from megatron_demix.evaluate.live import LiveModel
        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel

        initialize_parallel(ParallelSpec(), seed=1, timeout_s=600)
        spec = ModelSpec(num_layers=6, hidden_size=256, num_attention_heads=8, num_query_groups=4)
        train = TrainSpec(seq_length=LENGTH, global_batch_size=1, precision="fp32")
        stage = build_model(spec, train, ParallelSpec(), VOCABULARY, cached=True).eval()
        live = LiveModel(stage, vocab_size=VOCABULARY, max_tokens=LENGTH)
        rows = [likelihood_row(live, name, *shape, repeat=repeat) for name, shape in SHAPES.items()]
        rows.append(generation_row(live, repeat=repeat))
        destroy_parallel()
    return rows


def cpu_seconds(work: Callable[[], Any], repeat: int) -> float:
    """Median of `repeat` runs."""
    taken = []
    for _ in range(repeat):
        before = time.process_time()
        work()
        taken.append(time.process_time() - before)
    return statistics.median(taken)


def ids(source: random.Random, low: int, high: int) -> tuple[int, ...]:
    return tuple(source.randrange(VOCABULARY) for _ in range(source.randint(low, high)))


def likelihood_row(
    live: Any, name: str, questions: int, options: int, lengths: tuple[int, int], header_tokens: int, *, repeat: int
) -> dict[str, Any]:
    from megatron_demix.evaluate.likelihood import Request, likelihoods

    source = random.Random(name)
    header = ids(source, header_tokens, header_tokens)
    contexts = [header + ids(source, 10, 120) for _ in range(questions)]
    requests = [Request(context, ids(source, *lengths)) for context in contexts for _ in range(options)]
    tokens = sum(len(r.context) + len(r.continuation) - 1 for r in requests)
    extend, run_tokens = live.extend, []

    def counting(cache: Any, tokens: Any) -> Any:
        run_tokens.append(tokens.size)
        return extend(cache, tokens)

    with mock.patch.object(live, "extend", counting):
        found = likelihoods(live, requests, batch_tokens=BATCH_TOKENS)
    worst = max(abs(f.nats - p) for f, p in zip(found, plain(live, requests), strict=True))
    ours = cpu_seconds(lambda: likelihoods(live, requests, batch_tokens=BATCH_TOKENS), repeat)
    theirs = cpu_seconds(lambda: plain(live, requests), repeat)
    return {
        "texts": name,
        "evaluated tokens": tokens,
        "tokens run": sum(run_tokens),
        "evaluated tokens/s": tokens / ours,
        "plain forward tokens/s": tokens / theirs,
        "times a plain forward": theirs / ours,
        "largest difference, nats": worst,
    }


def plain(live: Any, requests: list[Any]) -> list[float]:
    """-log p of each continuation from a forward pass over its whole text."""
    import torch

    order = sorted(range(len(requests)), key=lambda i: len(requests[i].context) + len(requests[i].continuation))
    found = [0.0] * len(requests)
    begin = 0
    while begin < len(order):
        end = begin + 1
        length = len(requests[order[begin]].context) + len(requests[order[begin]].continuation)
        while end < len(order):
            longer = len(requests[order[end]].context) + len(requests[order[end]].continuation)
            if (end + 1 - begin) * longer > BATCH_TOKENS:
                break
            length, end = longer, end + 1
        batch = [requests[i] for i in order[begin:end]]
        tokens = torch.zeros(len(batch), length, dtype=torch.int64)
        for row, r in enumerate(batch):
            tokens[row, : len(r.context) + len(r.continuation)] = torch.tensor(r.context + r.continuation)
        with torch.inference_mode():
            positions = torch.arange(length - 1).expand(len(batch), -1)
            losses = live.stage(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
        for row, r in enumerate(batch):
            first = len(r.context) - 1
            found[order[begin + row]] = losses[row, first : first + len(r.continuation)].double().sum().item()
        begin = end
    return found


def generation_row(live: Any, *, repeat: int) -> dict[str, Any]:
    import torch

    from megatron_demix.evaluate.generate import generate

    source = random.Random(0)
    prompts = [ids(source, 60, 180) for _ in range(GENERATED)]
    pieces = [b"x"] * VOCABULARY

    def cached(given: list[tuple[int, ...]]) -> Any:
        settings: dict[str, Any] = {"stops": (), "max_new_tokens": NEW_TOKENS, "batch_tokens": BATCH_TOKENS}
        return generate(live, given, pieces=pieces, eod_id=VOCABULARY, **settings)

    def repeated(given: list[tuple[int, ...]]) -> None:
        """Without a cache: rows are filled up at the right, and the whole batch is run again for each token."""
        lengths = torch.tensor([len(p) for p in given])
        tokens = torch.zeros(len(given), int(lengths.max()) + NEW_TOKENS, dtype=torch.int64)
        for row, prompt in enumerate(given):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        for n in range(NEW_TOKENS):
            used = int(lengths.max()) + n
            with torch.inference_mode():
                logits = live.stage(tokens[:, :used].contiguous(), torch.arange(used).expand(len(given), -1), None)
            rows = torch.arange(len(given))
            tokens[rows, lengths + n] = logits[rows, lengths + n - 1].argmax(-1)

    cached(prompts[:2])
    ours = cpu_seconds(lambda: cached(prompts), repeat) / len(prompts)
    theirs = cpu_seconds(lambda: repeated(prompts[:REPEATED]), 1) / REPEATED
    return {
        "texts": f"{NEW_TOKENS} new tokens",
        "evaluated tokens": NEW_TOKENS * len(prompts),
        "tokens run": None,
        "evaluated tokens/s": NEW_TOKENS / ours,
        "plain forward tokens/s": NEW_TOKENS / theirs,
        "times a plain forward": theirs / ours,
        "largest difference, nats": None,
    }


if __name__ == "__main__":
    main()
