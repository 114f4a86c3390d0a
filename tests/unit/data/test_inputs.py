"""Every input format gives the same documents; every bad one is named with its line."""

import codecs
import errno
import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_demix import native
from megatron_demix.data import inputs
from megatron_demix.data.input_files import resolve_inputs
from megatron_demix.data.inputs import read_blocks, read_documents
from megatron_demix.errors import ConfigError, CorruptInput

TEXTS = ["first", 'with "quotes" \\ and\nnew lines\t', "naïve 你好 🙂\x00\u2028", "", "last"]


def documents(files, **options):
    return [t for batch in read_documents(files, **options) for t in batch.text.strings()]


def write_bad_row(file, kind="string"):
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = pa.array([b"good", b"a\xff", None, "ß".encode()])
    strings = pa.StringArray.from_buffers(4, *raw.buffers()[1:], raw.buffers()[0])
    pq.write_table(pa.table({"text": raw if kind == "binary" else strings}), file)


def write_all_formats(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    lines = "".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in enumerate(TEXTS)).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "unescaped.jsonl").write_bytes(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n\n" for t in TEXTS).encode()
    )
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[:40]) + gzip.compress(lines[40:]))
    (folder / "c.json.zst").write_bytes(zstandard.compress(lines[:40]) + zstandard.compress(lines[40:]))
    (folder / "d.ndjson").write_bytes(lines[:-1])
    pq.write_table(pa.table({"text": TEXTS, "id": range(len(TEXTS))}), folder / "e.parquet")
    (folder / "F.JSONL").write_bytes(lines)
    (folder / "G.JSONL.GZ").write_bytes(gzip.compress(lines))
    pq.write_table(pa.table({"text": TEXTS, "id": range(len(TEXTS))}), folder / "H.PARQUET")
    return sorted(folder.iterdir())


def test_formats_agree(tmp_path):
    for file in write_all_formats(tmp_path):
        assert documents([file]) == [t for t in TEXTS if t], file
        batches = list(read_documents([file]))
        assert next(r for b in batches for r in b.rejected)[1] == "empty"
        assert sum(b.file_bytes for b in read_blocks([file])) == file.stat().st_size


def test_zstandard_with_the_longest_window(tmp_path):
    """As `zstd --long=31` writes it of a stream, whose size it does not know."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True, ldm_hash_log=8)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(frame.compress(b'{"text": "one"}\n') + frame.flush())
    assert documents([tmp_path / "a.jsonl.zst"]) == ["one"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(codecs.BOM_UTF8 + lines))
    assert documents([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]) == ["one", "two"] * 2
    (tmp_path / "c.txt").write_bytes(codecs.BOM_UTF8 + b"three")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(codecs.BOM_UTF8 + b"four"))
    assert documents([tmp_path / "c.txt", tmp_path / "d.txt.gz"]) == ["three", "four"]
    parts = [read_blocks([tmp_path / "a.jsonl"], part=(i, 2), block_bytes=1) for i in range(2)]
    assert b"".join(block.data for part in parts for block in part) == lines


def test_a_wrong_key_says_where_it_is_set(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(
        CorruptInput,
        match=r"no key 'text' \(it has 'body'\)\. Name its key \(domains\[\]\.json_key in a study, --json-key of a tool\)",
    ):
        documents([tmp_path / "x.jsonl"])


def test_shards_of_one_name_are_told_apart(tmp_path):
    files = []
    for folder in ("b", "a/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.jsonl").write_text('{"text": ""}\n5\n')
        files.append(tmp_path / folder / "x.jsonl")
    read = read_documents(files, on_bad_document="reject")
    assert [place for batch in read for place, _ in batch.rejected] == [
        *("b/x.jsonl:1", "b/x.jsonl:2", "a/deep/x.jsonl:1", "a/deep/x.jsonl:2")
    ]
    (batch,) = read_documents(files[:1], on_bad_document="reject")
    assert batch.rejected[0][0] == "x.jsonl:1"


def test_plain_text_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"three"))
    assert documents([tmp_path / "a.txt", tmp_path / "b.md.gz"]) == ["one\ntwo\n", "three"]


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_blocks_hold_whole_lines(tmp_path, block_bytes):
    files = write_all_formats(tmp_path)
    expected = [(str(b.file), b.first) for b in read_blocks(files)]
    assert expected[0][1] == 1
    blocks = list(read_blocks(files, block_bytes=block_bytes))
    assert [b.number for b in blocks] == list(range(len(blocks)))
    json_lines = b"".join(b.data for b in blocks if b.file.name == "a.jsonl")
    assert json_lines == (tmp_path / "a.jsonl").read_bytes()
    second = next(b for b in blocks if b.file.name == "a.jsonl" and b.first > 1) if block_bytes < 64 else None
    if second:
        assert json_lines.split(b"\n")[second.first - 1] == second.data.split(b"\n")[0]


@pytest.mark.parametrize("longest_last", [False, True])
def test_a_parquet_block_is_no_larger_than_others(tmp_path, monkeypatch, longest_last):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"{n:03} " + "x" * (n if longest_last else 300) for n in range(800)]
    pq.write_table(pa.table({"text": texts, "id": range(800)}), tmp_path / "a.parquet", row_group_size=500)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 4096)
    blocks = list(read_blocks([tmp_path / "a.parquet"]))
    assert all(b.data.nbytes <= 4096 for b in blocks)
    assert 60 < len(blocks) < 300
    assert sum(b.file_bytes for b in blocks) == (tmp_path / "a.parquet").stat().st_size
    assert [b.first for b in blocks] == [1 + sum(len(c.data) for c in blocks[:n]) for n in range(len(blocks))]
    assert documents([tmp_path / "a.parquet"]) == texts
    rows = list(inputs.undecoded_documents(tmp_path / "a.parquet", json_key="text"))
    assert rows == [(n + 1, "row", {"text": text, "id": n}) for n, text in enumerate(texts)]


def test_a_parquet_document_larger_than_a_block(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["a", "b" * 9000, "c"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 100)
    assert documents([tmp_path / "a.parquet"]) == texts


@pytest.mark.parametrize(
    ("kind", "dictionary"),
    [
        *((kind, dictionary) for kind in ("string", "large_string", "binary", "large_binary") for dictionary in (False, True)),
        ("string_view", False),
    ],
)
def test_rows_without_text(tmp_path, kind, dictionary):
    """Of every type that may hold strings; pandas writes categories as dictionaries, which Arrow does not make of views."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for texts in (["a", None, "", "ß", None], [None, None], ["", ""], []):
        column = pa.array(texts).cast(getattr(pa, kind)())
        table = pa.table({"text": column.dictionary_encode() if dictionary else column, "id": range(len(texts))})
        pq.write_table(table, tmp_path / "a.parquet")
        batches = list(read_documents([tmp_path / "a.parquet"]))
        assert [t for b in batches for t in b.text.strings()] == [t for t in texts if t]
        missing = [(f"a.parquet:{row}", "empty") for row, t in enumerate(texts, 1) if not t]
        assert [r for b in batches for r in b.rejected] == missing
        rows = [record for _, _, record in inputs.undecoded_documents(tmp_path / "a.parquet", json_key="text")]
        assert rows == [{"text": text, "id": n} for n, text in enumerate(texts)]


def test_null_is_no_text_in_json_either(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": ""}\n')
    (batch,) = read_documents([tmp_path / "a.jsonl"])
    assert batch.text.strings() == ["a"]
    assert batch.rejected == [("a.jsonl:2", "empty"), ("a.jsonl:3", "empty")]


def test_a_slice_of_a_column(tmp_path):
    import pyarrow as pa

    column = pa.array(["zero", "one", None, "", "two", "three"])[1:5]
    batch = inputs.parse(inputs.Block(0, tmp_path / "a.parquet", "a.parquet", "column", column, 5, 0))
    assert batch.text.strings() == ["one", "two"]
    assert [place for place, _ in batch.rejected] == ["a.parquet:6", "a.parquet:7"]


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_a_row_that_is_not_utf8(tmp_path, kind):
    """Arrow takes any bytes for strings."""
    write_bad_row(tmp_path / "a.parquet", kind)
    with pytest.raises(
        CorruptInput, match=r"a\.parquet:2: not UTF-8 \(byte 0xff at offset 1\)\. Correct the file, or have such"
    ):
        documents([tmp_path / "a.parquet"])
    (batch,) = read_documents([tmp_path / "a.parquet"], on_bad_document="reject")
    assert batch.text.strings() == ["good", "ß"]
    assert batch.rejected == [("a.parquet:2", "not UTF-8 (byte 0xff at offset 1)"), ("a.parquet:3", "empty")]


BAD_LINES = [
    (b'{"text": "a\xff"}', "not UTF-8 (byte 0xff at offset 11)"),
    (b'{"text": "a"', "not JSON (Expecting ',' delimiter at column 13)"),
    (b"nonsense", "not JSON"),
    (b"[", "it begins an array, expected one JSON object a line"),
    (b'["text"]', "expected a JSON object with the text under 'text', found list"),
    (b'{"body": "a", "id": 1}', "no key 'text' (it has 'body', 'id')"),
    (b'{"text": 5}', "'text' is int, expected a string"),
    (b'{"text": "\\ud800"}', "lone surrogate at character 0"),
    (b'{"text": "a"} {"text": "b"}', "not JSON (Extra data"),
    (b'{"text": "a\tb"}', "not JSON (Invalid control character"),
    (b"[" * 100_000, "not JSON that can be read (nested too deeply)"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_lines(tmp_path, line, reason):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(CorruptInput, match=r"x\.jsonl:3: ") as raised:
        documents([file])
    assert reason in str(raised.value)
    assert "--on-bad-document reject" in str(raised.value)
    (batch,) = read_documents([file], on_bad_document="reject")
    assert batch.text.strings() == ["good", "fine"]
    assert len(batch.rejected) == 1
    assert batch.rejected[0][0] == "x.jsonl:3"
    assert reason in batch.rejected[0][1]


@pytest.mark.parametrize("neighbour", [b"", b'{"text": "b", "n": NaN}\n'], ids=["alone", "with NaN"])
def test_whether_a_document_is_kept_depends_on_no_other(tmp_path, neighbour):
    """The quick path takes a block without NaN, and Python's json reads no integer of more than 4300 digits by itself."""
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n" + neighbour)
    assert documents([tmp_path / "x.jsonl"])[0] == "a"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"text": st.text(st.characters(exclude_categories=["Cs"]))}, optional={"a": json_values, "té": json_values}
        )
    ),
    st.booleans(),
)
def test_quick_path_is_json(objects, ascii_only):
    data = "".join(json.dumps(o, ensure_ascii=ascii_only) + "\n" for o in objects).encode("utf-8", "surrogatepass")
    scanned = native.scan_json_lines(data, "text")
    if scanned is None:
        return  # NaN and lone surrogates; the slow path decides
    content, offsets, lines = scanned
    texts = [content[a:b].tobytes().decode() for a, b in itertools.pairwise(offsets)]
    assert texts == [o["text"] for o in objects]
    assert lines.tolist() == list(range(len(objects)))


@settings(max_examples=400, deadline=None)
@given(
    st.binary(max_size=60)
    | st.text(alphabet='{}[]":,\\untex 01-eE.falsr\n\t\ud83d\ude00', max_size=40).map(
        lambda t: t.encode("utf-16", "surrogatepass").decode("utf-16", "ignore").encode()
    )
)
@example(b'{"text":"a","text":"b"}')
@example(b'{"text":"\\ud83d\\ud83d"}')
@example(b'{"text":"\xed\xa0\x80"}')
@example(b'\xef\xbb\xbf{"text":"a"}')
@example(b'{"text":"a","n":01}')
def test_quick_path_accepts_nothing_that_json_refuses(data):
    scanned = native.scan_json_lines(data, "text")
    if scanned is None:
        return
    content, offsets, _ = scanned
    texts = [content[a:b].tobytes().decode() for a, b in itertools.pairwise(offsets)]
    assert texts == [json.loads(line.decode())["text"] for line in data.split(b"\n") if line.strip()]


def test_resolve(tmp_path):
    (tmp_path / "d" / "e").mkdir(parents=True)
    for name in ("d/b.jsonl", "d/a.jsonl", "d/e/c.jsonl.gz", "d/.hidden"):
        (tmp_path / name).write_text("x")
    assert [p.name for p in resolve_inputs(["d"], tmp_path)] == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    assert [p.name for p in resolve_inputs(["d/*.jsonl", "d/a.jsonl"], tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert [p.name for p in resolve_inputs([tmp_path / "d" / "*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ConfigError, match=r"inputs: d/\*\.csv matches no file \(looked in"):
        resolve_inputs(["d/*.csv"], tmp_path)
    (tmp_path / "d" / "a.jsonl").write_text("")
    for name, message in (("t.csv", "table"), ("T.TSV.gz", "table"), ("a.tar.gz", "Unpack"), ("a.jsonl.bz2", "Unpack")):
        (tmp_path / name).write_text("text,id\none,1\n")
        with pytest.raises(ConfigError, match=f"{name} is a.*{message}"):
            resolve_inputs([name], tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(CorruptInput, match=r"a\.jsonl is empty, expected text"):
        resolve_inputs(["d"], tmp_path)


@pytest.mark.parametrize("pattern", ["d", "d/**", "d/**/*"])
def test_what_speaks_of_records_is_none(tmp_path, pattern):
    """As on Hugging Face's hub, and as Spark leaves it."""
    for name in ("data/a.parquet", "data/B.JSON.gz", "data/_SUCCESS", "_delta_log/0.json", "README.md", "LICENSE", "b.txt"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text("" if name == "data/_SUCCESS" else "x")
    assert [p.name for p in resolve_inputs([pattern], tmp_path)] == ["b.txt", "B.JSON.gz", "a.parquet"]
    assert [p.name for p in resolve_inputs(["d/*.md"], tmp_path)] == ["README.md"]
    for name in ("notices_2020.txt", "readme_corpus.txt", "_part-0.jsonl"):
        (tmp_path / "d" / name).write_text("x")
    assert {"notices_2020.txt", "readme_corpus.txt"} < {p.name for p in resolve_inputs(["d"], tmp_path)}
    assert [p.name for p in resolve_inputs(["d/**/*_*.jsonl"], tmp_path)] == ["_part-0.jsonl"]


def test_a_folder_of_text_is_text(tmp_path):
    for name in ("d/README.md", "d/a.txt", "d/code/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [p.name for p in resolve_inputs(["d"], tmp_path)] == ["README.md", "a.txt", "b.py"]


@pytest.mark.parametrize("pattern", ["d", "d/**", "d/**/*.jsonl", "**/*.jsonl", "d*/**/*.jsonl"])
def test_folders_follow_links_and_leave_out_what_is_hidden(tmp_path, pattern):
    """Also into folders that lie elsewhere, and not twice into one that they lead back to."""
    root = tmp_path / "[root]"
    for name in ("d/a.jsonl", "d/sub/b.jsonl", "d/.cache/c.jsonl", "d/.d.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "e.jsonl").write_text("x")
    (root / "d" / "linked").symlink_to(tmp_path / "elsewhere")
    for loop in ("back", "sub/back", "sub/back_too"):
        (root / "d" / loop).symlink_to(root / "d")
    (tmp_path / "g.jsonl").write_text("x")
    (root / "d" / "f.jsonl").symlink_to(tmp_path / "g.jsonl")
    found = [str(p.relative_to(root)) for p in resolve_inputs([pattern], root)]
    assert found == ["d/a.jsonl", "d/f.jsonl", "d/linked/deep/e.jsonl", "d/sub/b.jsonl"]
    assert [str(p.relative_to(root)) for p in resolve_inputs(["d/.cache/*"], root)] == ["d/.cache/c.jsonl"]


def test_a_file_with_several_names_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text("x")
    (tmp_path / "d" / "latest.jsonl").symlink_to("a.jsonl")
    assert resolve_inputs(["d", tmp_path / "d", "d/../d/a.jsonl"]) == [Path("d/a.jsonl")]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ConfigError, match=f"inputs: {tmp_path} cannot be read: Permission denied"):
        resolve_inputs([tmp_path])


def test_damaged_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-9])
    import zstandard

    (tmp_path / "b.jsonl.zst").write_bytes(b"not zstandard")
    (tmp_path / "e.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "a"}\n' * 100)[:-3])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 but not really")
    pq.write_table(pa.table({"body": ["x"], "n": [1], "tags": [["x"]]}), tmp_path / "d.parquet")
    for name, message in (
        ("a.jsonl.gz", r"a\.jsonl\.gz cannot be read"),
        ("b.jsonl.zst", r"b\.jsonl\.zst cannot be read: not a Zstandard file"),
        ("e.jsonl.zst", r"e\.jsonl\.zst cannot be read: the file ends within a Zstandard frame"),
        ("c.parquet", r"c\.parquet: not a Parquet file, or a damaged one"),
        ("d.parquet", r"d\.parquet: no column 'text'; it has body, n, tags"),
        ("absent.jsonl", r"absent\.jsonl cannot be read"),
    ):
        with pytest.raises(CorruptInput, match=message):
            documents([tmp_path / name])
    with pytest.raises(CorruptInput, match=r"column 'n' holds int64, expected strings"):
        documents([tmp_path / "d.parquet"], json_key="n")
    with pytest.raises(CorruptInput, match=r"column 'tags' holds list<.*>, expected strings"):
        documents([tmp_path / "d.parquet"], json_key="tags")


def test_a_zstandard_file_of_repeated_text_is_read_in_parts(tmp_path):
    """4 bytes of it can stand for 128 KiB."""
    import zstandard

    line = b'{"text": "again and again"}\n'
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line * 8_000_000))
    program = (
        "import resource, sys; from megatron_demix.data.inputs import _Zstd; z = _Zstd(open(sys.argv[1], 'rb')); n = 0\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "while part := z.read(1 << 20): n += len(part)\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    said = subprocess.run([sys.executable, "-c", program, tmp_path / "a.jsonl.zst"], capture_output=True, text=True, check=True)
    size, grown = map(int, said.stdout.split())
    assert size == 8_000_000 * len(line)
    assert grown < 60_000  # KiB; the text has 219,000
