"""Batched greedy generation against one token at a time by plain forward passes; every answer ends."""

import numpy as np
import pytest
import torch

from megatron_demix.evaluate.generate import generate

EOD, VOCABULARY = 256, 257
PIECES = [bytes([i]) for i in range(256)] + [b""]


def greedy(live, prompt: tuple[int, ...], count: int) -> list[int]:
    """The next tokens, each by a forward pass over everything before it, until end-of-document."""
    tokens = list(prompt)
    live.stage.eval()
    for _ in range(count):
        with torch.no_grad():
            logits = live.stage(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0, -1, :VOCABULARY]
        tokens.append(int(logits.argmax()))
        if tokens[-1] == EOD:
            break
    return tokens[len(prompt) :]


def prompts(shared: int) -> list[tuple[int, ...]]:
    random = np.random.default_rng(shared)
    header = random.integers(0, 256, shared).tolist()
    return [(*header, *random.integers(0, 256, random.integers(1, 12)).tolist()) for _ in range(9)]


def answers(live, given, *, stops=(), max_new_tokens=12, batch_tokens=10_000):
    settings = {"stops": stops, "max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens}
    return generate(live, given, pieces=PIECES, eod_id=EOD, **settings)


def text(tokens: list[int]) -> str:
    return b"".join(PIECES[t] for t in tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("shared", [0, 7])
def test_against_plain_forward_passes(live, shared):
    given = prompts(shared)
    expected = [greedy(live, p, 12) for p in given]
    for batch_tokens in (1, 60, 10_000):
        found = answers(live, given, batch_tokens=batch_tokens)
        assert [f.text for f in found] == [text(e) for e in expected]
        assert [f.ended for f in found] == [e[-1] == EOD for e in expected]


def test_stop_texts_end_an_answer(live):
    given = prompts(3)
    whole = [text(greedy(live, p, 12)) for p in given]
    # Two characters in a row that one of the answers has: a stop text of several tokens.
    stop = next(w[4:6] for w in whole if "\ufffd" not in w[4:6])
    found = answers(live, given, stops=["never", stop])
    assert [f.text for f in found] == [w.split(stop)[0] for w in whole]
    assert [f.ended for f in found if stop not in f.text] != []
    assert all(f.ended for f, w in zip(found, whole, strict=True) if stop in w)


def test_every_answer_is_bounded(live):
    for found in answers(live, prompts(0), max_new_tokens=3):
        assert len(found.text) <= 3
    assert answers(live, []) == []
