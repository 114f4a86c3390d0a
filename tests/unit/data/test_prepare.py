"""Text to .bin/.idx: the same bytes for any number of workers, after a kill, and as Megatron's own builder would write."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import contents

from megatron_demix.data import encode_blocks
from megatron_demix.data import inputs as inputs_module
from megatron_demix.data.encode_blocks import Recipe
from megatron_demix.data.inputs import read_documents
from megatron_demix.data.prepare import prepare_domain, preprocess
from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.errors import ConfigError, CorruptInput, OutputExists
from megatron_demix.indexed.reader import IndexedReader
from megatron_demix.study.data import TokenizerSpec

ROOT = Path(__file__).parents[3]
BYTE = load_tokenizer(TokenizerSpec(type="byte"))


def write_corpus(path, documents=400):
    rng = np.random.default_rng(0)
    texts = [f"document {n} " + "ab 你 " * int(rng.integers(0, 60)) for n in range(documents)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, ""]))
    return texts


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs_module, "BLOCK_BYTES", 4096)
    write_corpus(tmp_path / "corpus.jsonl")
    return [tmp_path / "corpus.jsonl"]


def prepare(inputs, folder, **options):
    folder.mkdir()
    return prepare_domain(inputs, BYTE, folder, seed=5, progress=False, **options)


def texts_of(prefix):
    reader = IndexedReader(prefix)
    return [bytes(reader.tokens(d)[:-1].tolist()).decode() for d in range(reader.num_documents)]


def test_any_number_of_workers_gives_the_same_bytes(corpus, tmp_path):
    stats = prepare(corpus, tmp_path / "one")
    assert stats == prepare(corpus, tmp_path / "three", workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    expected = {f"{s}{x}" for s in ("train", "valid", "test") for x in (".bin", ".idx", ".meta.json")}
    assert contents(tmp_path / "one").keys() == expected | {"stats.json", "rejected.jsonl"}


def test_nothing_is_lost_and_statistics_are_true(corpus, tmp_path):
    stats = prepare(corpus, tmp_path / "out")
    written = [t for split in ("train", "valid", "test") for t in texts_of(tmp_path / "out" / split)]
    assert sorted(written) == sorted(t for b in read_documents(corpus) for t in b.text.strings())
    assert stats["rejected"] == 1
    assert json.loads((tmp_path / "out" / "rejected.jsonl").read_text()) == {"document": "corpus.jsonl:401", "reason": "empty"}
    for split, counts in stats["splits"].items():
        texts, index = texts_of(tmp_path / "out" / split), IndexedReader(tmp_path / "out" / split).index
        assert counts == {"documents": len(texts), "tokens": index.num_tokens, "bytes": sum(len(t.encode()) for t in texts)}
        meta = json.loads((tmp_path / "out" / f"{split}.meta.json").read_text())
        assert meta["tokenizer"] == BYTE.fingerprint
        assert "tokenizer_also" not in meta
        assert meta["tokens"] == counts["tokens"]
    assert json.loads((tmp_path / "out" / "stats.json").read_text()) == stats


def test_split_follows_the_text_alone(corpus, tmp_path):
    """Neither the order nor the company of a document moves it; equal documents never straddle splits."""
    prepare(corpus, tmp_path / "out")
    lines = corpus[0].read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join([*reversed(lines), *lines[:100], '{"text": "new"}\n']))
    prepare([tmp_path / "other.jsonl"], tmp_path / "other")
    for split in ("train", "valid", "test"):
        before, after = set(texts_of(tmp_path / "out" / split)), set(texts_of(tmp_path / "other" / split))
        assert before == after - {"new"}
    sizes = {s: len(texts_of(tmp_path / "out" / s)) for s in ("train", "valid", "test")}
    assert abs(sizes["train"] - 376) < 15
    prepare_domain(corpus, BYTE, make(tmp_path / "seed"), seed=6, progress=False)
    assert set(texts_of(tmp_path / "seed" / "test")) != set(texts_of(tmp_path / "out" / "test"))


def make(folder):
    folder.mkdir()
    return folder


def test_many_rejected_documents_are_said(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"content": "a"}\n' * 5)
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n' * 5)
    options = {"on_bad_document": "reject", "progress": False}
    reason = r"the first, other\.jsonl:1: no key 'text' \(it has 'content'\)"
    with pytest.raises(CorruptInput, match=rf"no documents \(5 empty or rejected; {reason}; .*/\.p\.work/rejected\.jsonl"):
        preprocess([tmp_path / "other.jsonl"], BYTE, tmp_path / "p", **options)
    assert len((tmp_path / ".p.work" / "rejected.jsonl").read_text().splitlines()) == 5
    with pytest.warns(
        UserWarning, match=rf"5 of 10 documents are empty or rejected, {reason}\. {tmp_path}/q\.rejected\.jsonl lists"
    ):
        preprocess([tmp_path / "other.jsonl", tmp_path / "text.jsonl"], BYTE, tmp_path / "q", **options)


def test_as_the_stock_builder_writes_it(corpus, tmp_path):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    counts = preprocess(corpus, BYTE, tmp_path / "ours", progress=False, workers=2)
    builder = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=DType.optimal_dtype(BYTE.vocab_size))
    for text in (t for b in read_documents(corpus) for t in b.text.strings()):
        builder.add_document(torch.tensor([*text.encode(), BYTE.eod_id]), [len(text.encode()) + 1])
    builder.finalize(str(tmp_path / "stock.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"stock{suffix}").read_bytes()
    assert counts == {"documents": 400, "tokens": counts["bytes"] + 400, "bytes": counts["bytes"], "rejected": 1}
    assert preprocess(corpus, BYTE, tmp_path / "ours", progress=False) == counts


def test_what_an_earlier_version_made_is_not_gone_on_with(corpus, tmp_path, monkeypatch):
    """Its tokenizer obeyed a file's truncation, and its blocks of Parquet had other sizes."""
    with monkeypatch.context() as earlier:
        earlier.setattr(encode_blocks, "FORMAT", encode_blocks.FORMAT - 1)
        assert preprocess(corpus, BYTE, tmp_path / "a", part=(0, 2), progress=False) is None
        preprocess(corpus, BYTE, tmp_path / "b", progress=False)
    assert preprocess(corpus, BYTE, tmp_path / "a", part=(1, 2), progress=False) is None
    assert preprocess(corpus, BYTE, tmp_path / "a", part=(0, 2), progress=False)["documents"] == 400
    with pytest.raises(OutputExists, match="not made from these inputs with these settings by this version"):
        preprocess(corpus, BYTE, tmp_path / "b", progress=False)


def test_sentences(tmp_path):
    pytest.importorskip("nltk")
    from megatron_demix.data.sentences import punkt

    text = "Dr. Smith came, e.g. by train. He left at 5 p.m. on Monday.\n\nNew paragraph, no stop\n\nThe end!"
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "One. Two."}) + "\n")
    preprocess([tmp_path / "x.jsonl"], BYTE, tmp_path / "s", sentences=punkt(), progress=False)
    reader = IndexedReader(tmp_path / "s")
    sentences = [bytes(t for t in reader.sequence(s).tolist() if t != 256).decode() for s in range(reader.index.num_sequences)]
    assert sentences == [
        "Dr. Smith came, e.g. by train.", "He left at 5 p.m. on Monday.", "New paragraph, no stop", "The end!", "One.", "Two.",
    ]  # fmt: skip
    assert reader.index.documents.tolist() == [0, 4, 6]
    assert [int(reader.sequence(s)[-1] == 256) for s in range(6)] == [0, 0, 0, 1, 0, 1]
    assert json.loads((tmp_path / "s.meta.json").read_text())["sentences"]
    assert "".join(punkt(keep_newlines=True)(text)) == text


def test_newlines_that_are_kept_make_another_output(tmp_path):
    pytest.importorskip("nltk")
    from megatron_demix.data.sentences import punkt

    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "One.\n Two."}) + "\n")
    preprocess([tmp_path / "x.jsonl"], BYTE, tmp_path / "s", sentences=punkt(), progress=False)
    with pytest.raises(OutputExists):
        preprocess([tmp_path / "x.jsonl"], BYTE, tmp_path / "s", sentences=punkt(keep_newlines=True), progress=False)


def test_a_document_of_blanks_has_an_end_of_its_own(tmp_path):
    pytest.importorskip("nltk")
    from megatron_demix.data.sentences import punkt

    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("  ", "One. Two.", " ")))
    preprocess([tmp_path / "x.jsonl"], BYTE, tmp_path / "s", sentences=punkt(), progress=False)
    reader = IndexedReader(tmp_path / "s")
    assert reader.index.documents.tolist() == [0, 1, 3, 4]
    assert [reader.sequence(s).tolist()[-1:] for s in (0, 2, 3)] == [[256]] * 3
    assert [len(reader.sequence(s)) for s in range(4)] == [1, 4, 5, 1]


KILLED = """
import sys, time
from pathlib import Path
from megatron_demix.data import outputs, prepare
from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.study.data import TokenizerSpec
from megatron_demix.data import inputs
inputs.BLOCK_BYTES = 4096
outputs.CHECKPOINT_S = 0.0
add = outputs.Outputs.add
def slow(self, done):
    add(self, done)
    print(self.blocks, flush=True)
    if self.blocks >= 5:
        time.sleep(600)  # until it is killed
outputs.Outputs.add = slow
tokenizer = load_tokenizer(TokenizerSpec(type="byte"))
prepare.prepare_domain([Path("corpus.jsonl")], tokenizer, Path("killed"), seed=5, progress=False)
"""


def test_killed_and_resumed(corpus, tmp_path, monkeypatch):
    (tmp_path / "killed").mkdir()
    process = subprocess.Popen([sys.executable, "-c", KILLED], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 5:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait(timeout=60)
    assert (tmp_path / "killed" / "journal.json").exists()
    done = json.loads((tmp_path / "killed" / "journal.json").read_text())["blocks"]
    assert done >= 4
    seen = []
    original = Recipe.__call__
    monkeypatch.setattr(Recipe, "__call__", lambda self, block: (seen.append(block.number), original(self, block))[1])
    prepare_domain(corpus, BYTE, tmp_path / "killed", seed=5, progress=False)
    assert seen[0] == done
    monkeypatch.undo()
    prepare(corpus, tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_bad_inputs(corpus, tmp_path):
    for split in ((0.5, 0.5), (1.0, 0.5, -0.5), (0, 0.5, 0.5), (0.5, 0.2, 0.2)):
        with pytest.raises(ConfigError, match="expected three shares >= 0 for train, valid and test that sum to 1"):
            prepare_domain(corpus, BYTE, tmp_path, split=split)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(CorruptInput, match=r"blank\.jsonl: no documents \(0 empty or rejected\)"):
        prepare([tmp_path / "blank.jsonl"], tmp_path / "a")
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ConfigError, match=r"none of the 2 documents fell into split '(valid|test)' \(share 0\.03\)"):
        prepare([tmp_path / "two.jsonl"], tmp_path / "b")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(CorruptInput, match=r"latin\.txt:1: not UTF-8 \(byte 0xe9 at offset 0\)"):
        prepare([tmp_path / "latin.txt"], tmp_path / "c", workers=2)


def test_tool(corpus, tmp_path):
    def tool(*arguments):
        command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--quiet", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    done = tool("--input", "corpus.jsonl", "--output-prefix", "p", "--tokenizer-type", "byte", "--append-eod", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["documents"] == 400
    preprocess(corpus, BYTE, tmp_path / "ours", progress=False)
    assert (tmp_path / "p_text_document.bin").read_bytes() == (tmp_path / "ours.bin").read_bytes()
    bad = tool("--input", "corpus.jsonl", "--output-prefix", "q", "--json-keys", "body", "--tokenizer-type", "byte")
    assert bad.returncode == 7
    assert "corpus.jsonl:1: no key 'body' (it has 'text')" in bad.stderr
    missing = tool("--input", "corpus.jsonl", "--output-prefix", "q", "--tokenizer-type", "HuggingFaceTokenizer")
    assert missing.returncode == 2
    assert "needs --tokenizer-model" in missing.stderr
