"""Tokenizers of every kind: the ids of their own library, exact byte counts, and special tokens that text cannot forge."""

import argparse
import base64
import inspect
import itertools
import json
import pydoc_data.topics
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_demix.data import vocabularies
from megatron_demix.data.engines import PROBE
from megatron_demix.data.text import TextBatch
from megatron_demix.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_demix.errors import ConfigError, CorruptInput
from megatron_demix.study.data import TokenizerSpec

TEXTS = [inspect.getsource(json.decoder), "Zwölf Boxkämpfer jagen Viktor. 日本語 🙂", "", "x <|endoftext|> y"]
REAL = [*pydoc_data.topics.topics.values(), *(inspect.getsource(m) for m in (argparse, inspect, random))]
"""English with mark-up, and code: 720 kB."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, module in (("a", json.encoder), ("b", argparse)):
        pieces = inspect.getsource(module).split("\n\n")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in pieces))
    return {"a": [folder / "a.jsonl"], "b": [folder / "b.jsonl"]}


@pytest.fixture(scope="module")
def bpe(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(TokenizerSpec(train_vocab_size=600, train_bytes=60_000), corpus, folder)
    return folder


def check_against_reference(source, texts):
    fast, reference = load_tokenizer(source), load_tokenizer(source, engine="reference")
    for a, b in zip(fast.encode_batch(texts), reference.encode_batch(texts), strict=True):
        assert np.array_equal(a, b)
    return fast


def text_bytes(tokenizer, texts):
    ids, offsets = tokenizer.encode_batch(texts)
    sums = np.concatenate([[0], np.cumsum(tokenizer.token_bytes[ids])])
    return (sums[offsets[1:]] - sums[offsets[:-1]]).tolist()


def test_threads_side_by_side_give_the_same_ids(bpe):
    tokenizer = load_tokenizer(bpe)
    assert tokenizer.engine_name == "gigatoken"
    batches = [TextBatch.of(TEXTS * n) for n in range(1, 30)]
    expected = [tokenizer.encode_batch(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(tokenizer.encode_batch, batches * 3))
    for one, other in zip(found, expected * 3, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_training_is_silent_unless_it_fails(monkeypatch, capfd):
    import os

    import gigatoken

    vocabularies.train_bpe(b"some text " * 50, 300)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(gigatoken, "train_bpe", lambda *_: (os.write(1, b"what went wrong\n"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        vocabularies.train_bpe(b"some text", 300)
    assert capfd.readouterr() == ("", "what went wrong\n")


def test_bpe(bpe):
    tokenizer = check_against_reference(bpe, [*TEXTS, *PROBE, *REAL])
    assert (tokenizer.engine_name, tokenizer.vocab_size, tokenizer.eod_id) == ("gigatoken", 600, 599)
    assert text_bytes(tokenizer, TEXTS) == [len(t.encode()) for t in TEXTS]
    ids, _ = tokenizer.encode_batch(TEXTS)
    assert 599 not in ids  # "<|endoftext|>" in a document is thirteen characters


def test_bpe_is_deterministic_and_ignores_the_order_of_documents(bpe, corpus, tmp_path):
    lines = corpus["b"][0].read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(reversed(lines)))
    again = TokenizerSpec(train_vocab_size=600, train_bytes=60_000)
    train_tokenizer(again, {"a": corpus["a"], "b": [tmp_path / "b.jsonl"]}, tmp_path / "again")
    for name in ("tokenizer.json", "meta.json"):
        assert (tmp_path / "again" / name).read_bytes() == (bpe / name).read_bytes()


def test_bpe_merges_are_those_of_the_tokenizers_library(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from megatron_demix.data.vocabularies import train_bpe

    text = inspect.getsource(argparse)
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator([text], trainers.BpeTrainer(vocab_size=399, initial_alphabet=alphabet, show_progress=False))
    ours = json.loads(train_bpe(text.encode(), 400))
    assert ours["model"]["merges"] == json.loads(theirs.to_str())["model"]["merges"]


def test_byte():
    tokenizer = load_tokenizer(TokenizerSpec(type="byte"))
    ids, offsets = tokenizer.encode_batch(TEXTS)
    assert bytes(ids[offsets[1] : offsets[2]].tolist()).decode() == TEXTS[1]
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.token_bytes.sum()) == (257, 256, 256)


def test_huggingface_file_and_its_copy(bpe, tmp_path):
    spec = TokenizerSpec(type="huggingface", model=bpe / "tokenizer.json")
    tokenizer = check_against_reference(spec, TEXTS)
    train_tokenizer(spec, {}, tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.fingerprint == tokenizer.fingerprint != load_tokenizer(bpe).fingerprint
    assert copy.fingerprints == load_tokenizer(bpe).fingerprints[::-1]
    assert np.array_equal(copy.token_bytes, tokenizer.token_bytes)


def test_a_files_truncation_and_padding_are_not_obeyed(bpe, tmp_path):
    """transformers writes them into the file after a call with truncation=True, padding=True. Documents are whole."""
    from tokenizers import Tokenizer

    changed = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    changed.enable_truncation(8)
    changed.enable_padding(length=8)
    changed.save(str(tmp_path / "tokenizer.json"))
    expected = load_tokenizer(bpe).encode_batch(TEXTS)
    for engine in ("auto", "reference"):
        tokenizer = load_tokenizer(TokenizerSpec(type="huggingface", model=tmp_path), engine=engine)
        for seen, whole in zip(tokenizer.encode_batch(TEXTS), expected, strict=True):
            assert np.array_equal(seen, whole)


def test_huggingface_end_of_document(bpe, tmp_path):
    data = json.loads((bpe / "tokenizer.json").read_text())
    data["added_tokens"][0]["content"] = "<over>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    spec = TokenizerSpec(type="huggingface", model=tmp_path)
    with pytest.raises(
        ConfigError, match=r"so nothing could end a document\. Name it as eos_token in a tokenizer_config\.json"
    ):
        load_tokenizer(spec)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<over>"}}')
    assert load_tokenizer(spec).eod_id == 599


@pytest.fixture
def gpt2(bpe, tmp_path):
    """A vocabulary of the trained tokenizer's tokens in GPT-2's two files, with ids of its own."""
    data = json.loads((bpe / "tokenizer.json").read_text())
    tokens = [vocabularies.EOD, *sorted(data["model"]["vocab"])]
    (tmp_path / "gpt2-vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in data["model"]["merges"])]
    (tmp_path / "gpt2-merges.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return tmp_path


def as_megatron_does(folder, text):
    """Ids by the rules of Megatron-LM's megatron/training/tokenizer/gpt2_tokenization.py."""
    import regex

    vocabulary = json.loads((folder / "gpt2-vocab.json").read_text())
    lines = (folder / "gpt2-merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    words = regex.findall(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", text
    )  # fmt: skip
    ids = []
    for word in words:
        parts = list(vocabularies._to_byte_level(word.encode()))
        while known := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            left, right = min(known, key=ranks.__getitem__)
            merged, place = [], 0
            while place < len(parts):
                both = parts[place : place + 2] == [left, right]
                merged.append(left + right if both else parts[place])
                place += 1 + both
            parts = merged
        ids += [vocabulary[part] for part in parts]
    return ids


def test_gpt2_has_the_ids_of_megatrons_own(gpt2, tmp_path):
    """Also of "<|endoftext|>" in a document, which is thirteen characters to it."""
    pytest.importorskip("regex")
    spec = TokenizerSpec(type="gpt2", model=gpt2)
    texts = [*TEXTS, *PROBE, *REAL[-3:]]
    tokenizer = check_against_reference(spec, texts)
    ids, offsets = tokenizer.encode_batch(texts)
    found = [ids[begin:end].tolist() for begin, end in itertools.pairwise(offsets.tolist())]
    assert found == [as_megatron_does(gpt2, text) for text in texts]
    assert (tokenizer.engine_name, tokenizer.vocab_size, tokenizer.eod_id) == ("gigatoken", 600, 0)
    assert text_bytes(tokenizer, texts) == [len(t.encode()) for t in texts]
    train_tokenizer(spec, {}, tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.fingerprint == tokenizer.fingerprint
    assert np.array_equal(copy.encode_batch(texts)[0], ids)
    (gpt2 / "gpt2-merges.txt").write_text("#version: 0.2\n")
    assert load_tokenizer(spec).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    ("file", "spoil", "error", "message"),
    [
        ("merges.txt", lambda text: text.split("\n", 1)[1], ConfigError, "begins with .* expected '#version: 0.2'"),
        ("merges.txt", lambda text: text.rstrip("\n"), ConfigError, "ends with .* and no line break"),
        ("merges.txt", lambda text: text + "a b c\n", CorruptInput, "'a b c' is no pair of tokens"),
        (
            "merges.txt",
            lambda text: text + "Q Q\n",
            CorruptInput,
            "gpt2-vocab.json: not a vocabulary that .*gpt2-merges.txt makes",
        ),
        (
            "vocab.json",
            lambda text: text.replace(vocabularies.EOD, "<over>"),
            CorruptInput,
            r"has no '<\|endoftext\|>', expected",
        ),
        ("vocab.json", lambda text: text.replace('"A": ', '"AAAA": '), CorruptInput, "has no 'A', expected"),
    ],
)
def test_what_is_no_gpt2(gpt2, file, spoil, error, message):
    path = gpt2 / f"gpt2-{file}"
    path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(error, match=message):
        load_tokenizer(TokenizerSpec(type="gpt2", model=gpt2 / "gpt2-vocab.json"))
    (gpt2 / "gpt2-merges.txt").unlink()
    with pytest.raises(ConfigError, match=r"type 'gpt2': .*gpt2-merges\.txt does not exist"):
        load_tokenizer(TokenizerSpec(type="gpt2", model=gpt2))


def test_sentencepiece(corpus, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus["b"][0]), model_prefix=str(tmp_path / "tokenizer"), vocab_size=500, model_type="bpe",
        byte_fallback=True, minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    )  # fmt: skip
    tokenizer = check_against_reference(
        TokenizerSpec(type="sentencepiece", model=tmp_path / "tokenizer.model"), [*TEXTS, *PROBE, *REAL]
    )
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (500, 2)
    assert text_bytes(tokenizer, TEXTS) == [len(t.encode()) for t in TEXTS]


def test_tiktoken(tmp_path):
    def ranks(merges):
        tokens = [bytes([b]) for b in range(256)] + merges
        return b"".join(base64.b64encode(t) + b" %d\n" % n for n, t in enumerate(tokens))

    (tmp_path / "r50k_base.tiktoken").write_bytes(ranks([b"de", b"def", b" s", b" se"]))
    spec = TokenizerSpec(type="tiktoken", model=tmp_path / "r50k_base.tiktoken")
    tokenizer = check_against_reference(spec, [*TEXTS, *PROBE, *REAL])
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (50257, 50256)
    assert text_bytes(tokenizer, TEXTS) == [len(t.encode()) for t in TEXTS]
    (tmp_path / "own.tiktoken").write_bytes(ranks([b"ab"]))
    own = TokenizerSpec(type="tiktoken", model=tmp_path / "own.tiktoken")
    with pytest.raises(ConfigError, match="no encoding is called 'own'"):
        load_tokenizer(own)
    (tmp_path / "own.tiktoken.json").write_text(r'{"pattern": "\\S+|\\s+", "special_tokens": {"<|endoftext|>": 300}}')
    train_tokenizer(own, {}, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").eod_id == 300
    (tmp_path / "own.tiktoken").write_bytes(b"one two three\n")
    with pytest.raises(CorruptInput, match="expected a base64 token and its rank on every line"):
        load_tokenizer(own)


def test_a_fast_engine_that_differs_is_not_used(bpe, monkeypatch):
    from megatron_demix.data import vocabularies

    def wrong(batch: TextBatch):
        return np.zeros(int(batch.offsets[-1]), np.uint32), batch.offsets

    monkeypatch.setattr(vocabularies.HuggingFace, "fast_engine", lambda self: wrong)
    tokenizer = load_tokenizer(bpe)
    assert tokenizer.engine_name == "huggingface"
    assert tokenizer.encode_batch(TEXTS)[0].any()


@pytest.mark.parametrize(
    ("options", "engine"), [({}, "gigatoken"), ({"single_word": True}, "huggingface"), ({"lstrip": True, "rstrip": True}, None)]
)
def test_added_tokens_are_found_where_the_tokenizer_finds_them(bpe, tmp_path, options, engine):
    """Words of their own, say, which gigatoken finds within others, too."""
    from tokenizers import AddedToken, Tokenizer

    extended = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    extended.add_tokens([AddedToken("<think>", **options), AddedToken("encod", **options)])
    extended.save(str(tmp_path / "tokenizer.json"))
    spec = TokenizerSpec(type="huggingface", model=tmp_path / "tokenizer.json")
    tokenizer = check_against_reference(spec, [*TEXTS, *REAL[-1:], "def<think>x, encoded encod  <think> \n"])
    assert engine in (None, tokenizer.engine_name)


def test_bad_tokenizers(bpe, tmp_path):
    with pytest.raises(ConfigError, match=r"no meta\.json there; expected a folder written by the prepare stage"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="type 'bpe' is trained on text"):
        load_tokenizer(TokenizerSpec())
    with pytest.raises(ConfigError, match=r"gone\.json does not exist"):
        load_tokenizer(TokenizerSpec(type="huggingface", model=tmp_path / "gone.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(CorruptInput, match=r"bad\.json: not a Hugging Face tokenizer\.json"):
        load_tokenizer(TokenizerSpec(type="huggingface", model=tmp_path / "bad.json"))
    with pytest.raises(CorruptInput, match=r"bad\.json: not a SentencePiece model"):
        load_tokenizer(TokenizerSpec(type="sentencepiece", model=tmp_path / "bad.json"))
    with pytest.raises(ConfigError, match="needs text to be trained on, and no domain has text inputs"):
        train_tokenizer(TokenizerSpec(), {}, tmp_path / "x")
    meta = json.loads((bpe / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CorruptInput, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((bpe / "tokenizer.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"vocab_size": 7}))
    with pytest.raises(CorruptInput, match=r"meta\.json says 7 ids, its file has 600"):
        load_tokenizer(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"eod_id": 600}))
    with pytest.raises(CorruptInput, match="end-of-document id 600 is not below 600"):
        load_tokenizer(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"type": "word"}))
    with pytest.raises(
        ConfigError, match="tokenizer type 'word' is not one of byte, bpe, huggingface, gpt2, sentencepiece, tiktoken"
    ):
        load_tokenizer(tmp_path)


@pytest.fixture
def trained_on(monkeypatch):
    """What tokenizers were trained on."""
    texts = []
    train = vocabularies.train_bpe
    monkeypatch.setattr(vocabularies, "train_bpe", lambda text, size: [train(text, size), texts.append(text)][0])
    return texts


@pytest.mark.parametrize("size", [1000, 40_000, 200_000])
def test_each_domain_gives_the_same_number_of_bytes(trained_on, tmp_path, size):
    """Whatever the size of its documents and what else is in its files, and whatever their order."""
    words = " ".join(REAL).replace("\n", " ").encode("ascii", "ignore").decode()
    texts = [words[n : n + size] for n in range(0, 200_000, max(size // 2, 5000))]
    lines = [json.dumps({"text": text, "html": "x" * 20_000}) + "\n" for text in [*texts, *texts[:9]]]
    for name, order in (("a", lines), ("b", lines[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(order))
        samples = {"own": [tmp_path / f"{name}.jsonl"], "other": [tmp_path / f"{name}.jsonl"]}
        train_tokenizer(TokenizerSpec(train_vocab_size=300, train_bytes=60_000), samples, tmp_path / name)
    assert trained_on[0] == trained_on[1]
    assert len(trained_on[0].replace(b"\n", b"")) == 60_000
    half = trained_on[0][: len(trained_on[0]) // 2].split(b"\n")
    assert len(set(half)) == len(half)


def test_a_domain_with_too_little_text_is_named(trained_on, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n{"text": "more text"}\n{"text": "some text"}\n')
    samples = {"small": [tmp_path / "a.jsonl"]}
    with pytest.warns(
        UserWarning, match=r"'small' has 18 bytes of different documents, fewer than its part of train_bytes, 400"
    ):
        train_tokenizer(TokenizerSpec(train_vocab_size=300, train_bytes=400), samples, tmp_path / "out")
    assert sorted(trained_on[0].split(b"\n")) == [b"more text", b"some text"]
