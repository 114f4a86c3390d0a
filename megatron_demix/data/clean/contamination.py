"""Evaluation tasks' text: an index of its n-grams, for datatrove's filter that removes documents which contain one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.artifact import write_json
from megatron_demix.data.clean.duplicates import HASH
from megatron_demix.data.clean.trove import NGramsDecontConfig, PipelineStep, create_hash_func, ngrams, simplify_text
from megatron_demix.data.clean.words import WordsAndCharacters
from megatron_demix.data.inputs import undecoded_documents
from megatron_demix.errors import CorruptInput
from megatron_demix.study.data import ContaminationSpec

SUMMARY = "tasks.json"


def config(spec: ContaminationSpec) -> NGramsDecontConfig:
    return NGramsDecontConfig(n_grams=spec.ngram, hash_config=HASH)


class IndexTasks(PipelineStep):
    """One index a task, in the form NGramsDecontFilter reads (datatrove's own indexer needs lighteval, which downloads).

    An item of a task is a line; its text is all its strings, in order, so that a question that runs on into its answer is found
    as well as either. An item with fewer words than an n-gram cannot be looked for; tasks.json counts these.
    """

    type, name = "🦠 - DECONT", "index of local tasks"

    def __init__(self, folder: Path, files: dict[str, list[Path]], spec: ContaminationSpec) -> None:
        super().__init__()
        self.folder, self.files, self.spec = folder, files, spec

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        settings, words = config(self.spec), WordsAndCharacters()
        hash_of = create_hash_func(HASH)
        self.folder.mkdir(parents=True, exist_ok=True)
        summary = {}
        for task, files in self.files.items():
            hashes: set[int] = set()
            items = short = 0
            for text in (t for file in files for t in _items(file, self.spec.keys)):
                found = [
                    " ".join(g)
                    for g in ngrams(words.word_tokenize(simplify_text(text, settings.norm_config)), settings.n_grams)
                ]
                hashes.update(map(hash_of, found))
                items, short = items + 1, short + (not found)
            np.array(sorted(hashes), dtype=HASH.np_descr).tofile(self.folder / f"{task}.index.hashes")
            summary[task] = {"items": items, "too_short": short, "ngrams": len(hashes)}
        write_json(self.folder / SUMMARY, summary)


def _items(file: Path, keys: list[str]) -> Iterator[str]:
    """The text of each line of a task's file."""
    for line, kind, item in undecoded_documents(file, json_key=None):
        try:
            record = json.loads(item) if kind == "json" else item
        except ValueError as e:
            raise CorruptInput(f"{file}:{line}: not JSON ({e}); a task's file holds one item a line.") from e
        if keys:
            if not isinstance(record, dict) or (missing := [k for k in keys if k not in record]):
                raise CorruptInput(f"{file}:{line}: no key {missing[0]!r}; correct the file or the keys of the tasks.")
            record = [record[k] for k in keys]
        try:
            text = "\n".join(_strings(record))
        except UnicodeDecodeError as e:
            raise CorruptInput(f"{file}:{line}: not UTF-8 ({e.reason} at offset {e.start}); correct the file.") from e
        yield text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, bytes):
        yield value.decode()
    elif isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
