"""Cached, batched likelihoods against the plain forward pass of each text; the scores that tasks make of them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from task_files import ARC, write_all, write_lines

from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.evaluate import suite
from megatron_demix.evaluate.likelihood import Likelihood, Request, likelihoods
from megatron_demix.evaluate.tasks.choices import Choices
from megatron_demix.evaluate.tasks.task import read_task
from megatron_demix.pipeline.task_inputs import ScoredTasks
from megatron_demix.study.data import TokenizerSpec
from megatron_demix.study.search import TaskSpec

MAX_TOKENS, VOCABULARY = 160, 257


def plain(live, request: Request) -> Likelihood:
    """By one forward pass over the whole text."""
    tokens = torch.tensor([request.context + request.continuation])
    live.stage.eval()
    with torch.no_grad():
        logits = live.stage(tokens[:, :-1], torch.arange(tokens.shape[1] - 1)[None], None)[0, :, :VOCABULARY].double()
    scored, targets = logits[len(request.context) - 1 :], tokens[0, len(request.context) :]
    nats = -scored.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return Likelihood(nats.numpy(), bool((scored.argmax(-1) == targets).all()))


def requests_of(seed: int, *, shared: int) -> list[Request]:
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(random.integers(0, VOCABULARY, random.integers(low, high)).tolist())

    header = ids(shared, shared + 1)
    contexts = [header + ids(1, 20) for _ in range(6)]
    return [Request(context, ids(1, 8)) for context in contexts for _ in range(random.integers(1, 5))]


@pytest.mark.parametrize("shared", [0, 9])
def test_against_plain_forward_passes(live, shared):
    requests = requests_of(shared, shared=shared)
    # One whose every token is the most probable one: chosen greedily, one after the other.
    context, answer = requests[0].context, []
    for _ in range(3):
        answer += [next(i for i in range(VOCABULARY) if plain(live, Request(context, (*answer, i))).greedy)]
    requests.append(Request(context, tuple(answer)))
    for batch_tokens in (1, 150, 10_000):
        found = likelihoods(live, requests, batch_tokens=batch_tokens)
        for request, measured in zip(requests, found, strict=True):
            expected = plain(live, request)
            assert measured.nats == pytest.approx(expected.nats, rel=2e-5)
            assert measured.token_nats == pytest.approx(expected.token_nats, rel=1e-4, abs=1e-5)
            assert measured.greedy == expected.greedy
        assert found[-1].greedy


@contextmanager
def tokens_run(live) -> Iterator[list[int]]:
    """How many tokens the model is asked to run meanwhile, call by call."""
    extend, counts = live.extend, []

    def counting(cache, tokens):
        counts.append(tokens.size)
        return extend(cache, tokens)

    with mock.patch.object(live, "extend", counting):
        yield counts


def test_what_texts_share_is_run_once(live):
    requests = [Request((*range(50), n), (5, c)) for n in range(4) for c in range(3)]
    with tokens_run(live) as run:
        likelihoods(live, requests, batch_tokens=10_000)
    # 50 that all share; then twelve rows of a context's last token and a continuation's first.
    assert sum(run) == 50 + 12 * 2


def test_nothing_to_score(live):
    assert likelihoods(live, [], batch_tokens=10) == []


def test_scores_of_tasks(live, tmp_path):
    """acc, acc_norm and bits per byte, from the plain likelihoods of the texts as they are written."""
    codec = load_tokenizer(TokenizerSpec(type="byte"))
    spec = TaskSpec(name="arc", format="arc", path=write_lines(tmp_path / "arc.jsonl", ARC), num_shots=1)
    ready = suite.Suite([read_task(spec)], codec, max_tokens=MAX_TOKENS)
    scored = ready.score(live, batch_tokens=300)
    header = "Question: Which one is wet?\nAnswer: rain\n\n"
    right = right_by_byte = 0
    nats = num_bytes = 0.0
    for item in ARC[1:]:
        context = f"{header}Question: {item['question']}\nAnswer:"
        texts = item["choices"]["text"]
        found = [plain(live, Request(tuple(context.encode()), tuple(f" {t}".encode()))).nats for t in texts]
        gold = item["choices"]["label"].index(item["answerKey"])
        right += int(np.argmin(found)) == gold
        right_by_byte += int(np.argmin([n / len(t) for n, t in zip(found, texts, strict=True)])) == gold
        nats, num_bytes = nats + found[gold], num_bytes + len(texts[gold]) + 1
    assert scored.scores == pytest.approx(
        {"arc/acc": right / 3, "arc/acc_norm": right_by_byte / 3, "arc/bits_per_byte": nats / math.log(2) / num_bytes}, rel=1e-5
    )
    assert scored.notes == {"arc": {"items": 3, "cut": 0}}


def test_only_the_scores_asked_for(live, tmp_path):
    tasks = write_all(tmp_path)
    codec = load_tokenizer(TokenizerSpec(type="byte"))
    spec = TaskSpec(name="a", format="arc", path=tasks["arc"], scores=["bits_per_byte"])
    everything = spec.model_copy(update={"scores": None})
    few, all_ = (suite.Suite([read_task(s)], codec, max_tokens=MAX_TOKENS) for s in (spec, everything))
    assert [s.name for s in few.scores] == ["a/bits_per_byte"]
    with tokens_run(live) as for_few:
        only = few.score(live, batch_tokens=300).scores
    with tokens_run(live) as for_all:
        every = all_.score(live, batch_tokens=300).scores
    assert only["a/bits_per_byte"] == pytest.approx(every["a/bits_per_byte"], rel=1e-5)
    assert sum(for_all) > sum(for_few)


def test_texts_become_requests():
    codec = load_tokenizer(TokenizerSpec(type="byte"))
    requests, num_cut = suite.encode_pairs(codec, [("ab ", "c"), ("", "xy"), ("abcdef", "gh")], 5)
    assert [(bytes(r.context), bytes(r.continuation)) for r in (requests[0], requests[2])] == [(b"ab", b" c"), (b"cdef", b"gh")]
    assert requests[1].context == (256,)
    assert num_cut == 1
    with pytest.raises(ValueError, match="one token or more"):
        Request((), (1,))


def test_answers_are_as_long_as_their_characters(tmp_path):
    """As in lm-evaluation-harness, whatever the characters' bytes are."""
    question = {
        "id": "q",
        "question": "q",
        "choices": {"text": ["é", "日本", "ab"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    spec = TaskSpec(name="a", format="arc", path=write_lines(tmp_path / "a.jsonl", [question]))
    task = read_task(spec)
    choices = suite.Suite([task], load_tokenizer(TokenizerSpec(type="byte")), max_tokens=100).texts["a"].choices
    assert choices.answer_chars_R.tolist() == [1, 2, 2]
    assert (
        choices.scores(np.array([2.2, 4.0, 3.9]))["acc_norm"] == 0.0
    )  # the third; by bytes it would be the second, the right one
    # Scores of the time when it was by bytes have another key.
    assert ScoredTasks([spec], ["digest"]).settings["tasks"][0]["acc_norm"] == "by character"


def test_bytes_are_those_of_the_tokens_that_are_scored(tmp_path):
    """Of an answer that is too long for the model only the end is scored."""
    file = write_lines(tmp_path / "g.jsonl", [{"question": "q", "answer": "x" * n + "#### 7"} for n in (10, 500)])
    task = read_task(TaskSpec(name="g", format="gsm8k", path=file, scores=["bits_per_byte"]))
    ready = suite.Suite([task], load_tokenizer(TokenizerSpec(type="byte")), max_tokens=100)
    assert ready.texts["g"].tokens_R.tolist() == [17, 100]
    both = read_task(TaskSpec(name="g", format="gsm8k", path=file))
    texts = suite.Suite([both], load_tokenizer(TokenizerSpec(type="byte")), max_tokens=100).texts
    assert texts["g"].scores == {"bits_per_byte": "g/bits_per_byte"}, "those alone that likelihoods decide"
    assert ready.texts["g"].choices.gold_bytes == 117


def test_a_model_that_gives_no_numbers_has_no_accuracy():
    choices = Choices(np.array([2, 2]), np.array([0, 1]), np.ones(4), 4)
    assert math.isnan(choices.scores(np.array([1, 2, np.nan, 1]))["acc"])
