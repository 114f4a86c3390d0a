"""Killed before any of the calls by which its files change, a run is gone on with, to the bytes of an undisturbed one."""

import json
import os

import pytest
from blends import build
from folders import contents

from megatron_demix import native
from megatron_demix.data import blend_data, inputs, outputs
from megatron_demix.data.prepare import prepare_domain, preprocess
from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.study.data import TokenizerSpec

CALLS = ("rename", "replace", "fsync", "fdatasync", "pwrite", "unlink", "mkdir", "link", "copy_file_range")
BYTE = load_tokenizer(TokenizerSpec(type="byte"))


def runs_until_call(number: int, run) -> bool:
    """Run in a child that dies before the number-th of CALLS and of native.reserve; whether it came to its end."""
    child = os.fork()
    if child == 0:
        left = number

        def dying(call):
            def counted(*arguments, **options):
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return call(*arguments, **options)

            return counted

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        native.reserve = dying(native.reserve)
        try:
            run()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 256)
    monkeypatch.setattr(outputs, "CHECKPOINT_S", 0.0)
    lines = [json.dumps({"text": f"document {n} " * (n % 5)}) for n in range(40)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return [tmp_path / "corpus.jsonl"]


def in_parts(folder, corpus):
    for part in ((1, 2), (0, 2)):
        preprocess(corpus, BYTE, folder / "x", part=part, progress=False)


def domain_in_parts(folder, corpus):
    if not (folder / "done").exists():
        for part in ((1, 2), (0, 2), None):
            prepare_domain(corpus, BYTE, folder / "x", part=part, split=(0.6, 0.2, 0.2), progress=False)
        (folder / "done").touch()


MAKERS = {
    "one run": lambda folder, corpus: preprocess(corpus, BYTE, folder / "x", progress=False),
    "parts": in_parts,
    "a domain in parts": domain_in_parts,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_tokenizing(corpus, tmp_path, maker):
    make = MAKERS[maker]
    make(tmp_path / "whole", corpus)
    expected, number, finished = contents(tmp_path / "whole"), 0, False
    while not finished:
        folder = tmp_path / str(number)
        folder.mkdir()
        finished = runs_until_call(number, lambda folder=folder: make(folder, corpus))
        if maker != "a domain in parts" and not finished:
            assert not (folder / "x.bin").exists() or (folder / "x.idx").exists()
        make(folder, corpus)
        assert contents(folder) == expected, number
        number += 3  # each has been tried; all of them take three times as long
    assert number > 30


@pytest.mark.parametrize("mode", ["view", "materialise", "args"])
def test_blending(pool, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(blend_data, "SHARD_BYTES", 1)
    monkeypatch.setattr(blend_data, "SHARD_STEP_DOCUMENTS", 400)
    build(pool, tmp_path / "whole" / "b", mode=mode)
    expected, number, finished = contents(tmp_path / "whole"), 0, False
    while not finished:
        folder = tmp_path / f"{number:05d}"
        folder.mkdir()
        finished = runs_until_call(number, lambda folder=folder: build(pool, folder / "b", mode=mode))
        assert finished or not (folder / "b.blend.json").exists() or number > 10
        build(pool, folder / "b", mode=mode)
        assert contents(folder) == expected, number
        number += 1
    assert number > 10
