"""tools/preprocess_data.py as its users call it: every input format, every kind of tokenizer, sentences, parts, exit codes."""

import base64
import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from megatron_demix.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_demix.indexed.reader import IndexedReader
from megatron_demix.study.data import TokenizerSpec

TEXTS = ["First document. It has two sentences.", "def f(x):\n    return x + 1\n", "naïve 你好 🙂"]


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
    spec = importlib.util.spec_from_file_location("preprocess_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(tool, tmp_path, monkeypatch, capfd):
    """(exit code, what it printed, what it said) of the tool in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["preprocess_data.py", "--quiet", *map(str, arguments)])
        try:
            code = tool.main()
        except SystemExit as e:
            code = e.code
        return (code, *capfd.readouterr())

    return run


def lines(texts=TEXTS, **more):
    return "".join(json.dumps({"text": t} | more) + "\n" for t in texts).encode()


def write(folder, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    folder.mkdir()
    match kind:
        case "jsonl" | "json" | "ndjson":
            (folder / f"x.{kind}").write_bytes(lines())
        case "jsonl.gz":
            (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines()))
        case "jsonl.zst":
            (folder / "x.jsonl.zst").write_bytes(zstandard.compress(lines()))
        case "parquet":
            pq.write_table(pa.table({"id": [1, 2, 3], "text": TEXTS}), folder / "x.parquet")
        case "txt":
            for number, text in enumerate(TEXTS):
                (folder / f"{number}.txt").write_text(text)
        case "mixed":
            (folder / "a.jsonl").write_bytes(lines(TEXTS[:1]))
            (folder / "deeper").mkdir()
            (folder / "deeper" / "b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[1:2])))
            (folder / "deeper" / "c.txt").write_text(TEXTS[2])


def texts_of(prefix):
    reader = IndexedReader(prefix)
    return [bytes(t for t in reader.tokens(d).tolist() if t < 256).decode() for d in range(reader.num_documents)]


KINDS = ["jsonl", "json", "ndjson", "jsonl.gz", "jsonl.zst", "parquet", "txt", "mixed"]


@pytest.mark.parametrize("kind", KINDS)
def test_formats_folders_and_globs(call, tmp_path, kind):
    write(tmp_path / "corpus", kind)
    patterns = {"folder": ["corpus"], "glob": ["corpus/**/*.*"], "files": sorted(p for p in Path("corpus").rglob("*.*"))}
    for how, inputs in patterns.items():
        code, said, _ = call("--input", *inputs, "--output-prefix", how, "--tokenizer-type", "byte", "--append-eod")
        assert code == 0
        assert json.loads(said)["documents"] == 3
        assert texts_of(tmp_path / f"{how}_text_document") == TEXTS
    for suffix in (".bin", ".idx"):
        assert len({(tmp_path / f"{how}_text_document{suffix}").read_bytes() for how in patterns}) == 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of every kind, and the flags that name it."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("models")
    (folder / "corpus.jsonl").write_bytes(lines([f"word{n} and text {n}" for n in range(400)]))
    train_tokenizer(TokenizerSpec(train_vocab_size=400), {"x": [folder / "corpus.jsonl"]}, folder / "bpe")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.jsonl"), model_prefix=str(folder / "sp"), vocab_size=400, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    ranks = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    (folder / "r50k_base.tiktoken").write_bytes(ranks)
    trained = json.loads((folder / "bpe" / "tokenizer.json").read_text())
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "vocab.json").write_text(json.dumps({**trained["model"]["vocab"], "<|endoftext|>": 399}))
    merges = "".join(f"{' '.join(pair)}\n" for pair in trained["model"]["merges"])
    (folder / "gpt2" / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    specs = {
        "GPT2BPETokenizer": TokenizerSpec(type="gpt2", model=folder / "gpt2"),
        "HuggingFaceTokenizer": TokenizerSpec(type="huggingface", model=folder / "bpe" / "tokenizer.json"),
        "SentencePieceTokenizer": TokenizerSpec(type="sentencepiece", model=folder / "sp.model"),
        "tiktoken": TokenizerSpec(type="tiktoken", model=folder / "r50k_base.tiktoken"),
        "byte": TokenizerSpec(type="byte"),
        "bpe": folder / "bpe",
    }
    return {kind: (spec, getattr(spec, "model", spec)) for kind, spec in specs.items()}


def flags_of(kind, path):
    """As Megatron's scripts name a tokenizer's files."""
    if kind == "GPT2BPETokenizer":
        return ["--vocab-file", path / "vocab.json", "--merge-file", path / "merges.txt"]
    return ["--tokenizer-model", path] if path else []


@pytest.mark.parametrize(
    "kind", ["HuggingFaceTokenizer", "GPT2BPETokenizer", "SentencePieceTokenizer", "tiktoken", "byte", "bpe"]
)
def test_tokenizers(call, models, tmp_path, kind):
    spec, path = models[kind]
    (tmp_path / "x.jsonl").write_bytes(lines())
    code, said, _ = call(
        "--input", "x.jsonl", "--output-prefix", "p", "--tokenizer-type", kind, *flags_of(kind, path), "--append-eod"
    )
    assert code == 0
    tokenizer = load_tokenizer(spec, engine="reference")
    ids, offsets = tokenizer.encode_batch(TEXTS)
    reader = IndexedReader(tmp_path / "p_text_document")
    for d in range(3):
        assert reader.tokens(d).tolist() == [*ids[offsets[d] : offsets[d + 1]].tolist(), tokenizer.eod_id]
    meta = json.loads((tmp_path / "p_text_document.meta.json").read_text())
    assert (meta["tokenizer"], meta["eod_id"]) == (tokenizer.fingerprint, tokenizer.eod_id)
    assert json.loads(said)["bytes"] == sum(len(t.encode()) for t in TEXTS)


def test_sentences_and_several_keys(call, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines(title="A title."))
    code, said, _ = call("--input", "x.jsonl", "--output-prefix", "p", "--json-keys", "text", "title", "--tokenizer-type",
                         "byte", "--split-sentences", "--append-eod", "--partitions", 2)  # fmt: skip
    assert code == 0
    assert [Path(json.loads(line)["prefix"]).name for line in said.splitlines()] == ["p_text_sentence", "p_title_sentence"]
    index = IndexedReader(tmp_path / "p_text_sentence").index
    assert (index.num_documents, index.documents.tolist()) == (3, [0, 2, 3, 4])
    assert json.loads((tmp_path / "p_text_sentence.meta.json").read_text())["sentences"]
    code, _, said = call("--input", "x.jsonl", "--output-prefix", "q", "--keep-newlines", "--tokenizer-type", "byte")
    assert (code, "--keep-newlines has no effect" in said) == (2, True)


def test_again_in_parts_and_over_something_else(call, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines() * 20)
    flags = ("--input", "x.jsonl", "--tokenizer-type", "byte", "--append-eod", "--output-prefix")
    code, counts, _ = call(*flags, "whole")
    assert code == 0
    assert call(*flags, "whole") == (0, counts, "")
    assert call(*flags, "parts", "--partitions", 3, "--partition", 2)[:2] == (0, "")
    code, said, complaint = call(*flags, "parts", "--partitions", 3, "--partition", 0)
    assert (code, said, complaint) == (0, "", "parts_text_document is not published yet: other partitions are missing\n")
    assert not list(tmp_path.glob("parts*"))
    assert call(*flags, "parts", "--partitions", 3)[0] == 0
    for suffix in (".bin", ".idx", ".meta.json"):
        expected = (tmp_path / f"whole_text_document{suffix}").read_bytes()
        assert (tmp_path / f"parts_text_document{suffix}").read_bytes() == expected
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    code, _, complaint = call(*flags, "whole", "--on-bad-document", "reject")
    assert (code, "was not made from these inputs with these settings" in complaint) == (6, True)
    code, _, complaint = call(*flags, "new", "--partitions", 3, "--partition", 3)
    assert (code, complaint) == (2, "error: --partition is 3 of 3 partitions, expected 0 to 2.\n")


@pytest.mark.parametrize(
    ("data", "flags", "code", "message"),
    [
        (lines(), ["--json-keys", "body"], 7, "x.jsonl:1: no key 'body' (it has 'text')"),
        (
            lines(),
            ["--json-key", "body"],
            7,
            "no key 'body' (it has 'text'). Name its key (domains[].json_key in a study, --json-key of",
        ),
        (b'{"text": "a"}\n{"text": "b', [], 7, "x.jsonl:2: not JSON"),
        (b"", [], 7, "x.jsonl is empty, expected text"),
        (lines(), ["--tokenizer-type", "HuggingFaceTokenizer"], 2, "needs --tokenizer-model"),
        (lines(), ["--input", "absent"], 2, "absent matches no file"),
        (lines(), ["--partitions", "0"], 2, "--partitions is 0, expected at least 1"),
        (lines(), ["--workers", "0"], 2, "--workers is 0, expected at least 1"),
        (lines(), ["--vocab-file", "v"], 2, "are for GPT2BPETokenizer, --tokenizer-type is byte"),
        (lines(), ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", "v"], 2, "needs --vocab-file and --merge-file"),
        (lines(), ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", "v", "--merge-file", "m"], 2, "v does not exist"),
    ],
)
def test_what_is_refused(call, tmp_path, data, flags, code, message):
    (tmp_path / "x.jsonl").write_bytes(data)
    seen, _, complaint = call("--input", "x.jsonl", "--output-prefix", "p", "--tokenizer-type", "byte", *flags)
    assert seen == code
    assert message in complaint
    assert not list(tmp_path.glob("p*"))
