"""Cleaning text before it is prepared: duplicates within and across domains, and documents that heuristics call junk.

The work is datatrove's (extra [data]); here is only which of its steps run with which settings, and an account of what was
removed and why. The defaults are the paper's near-duplicate setting: 24-grams, 20 bands of 13 MinHashes (about 90 % alike).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_demix.artifact import write_json
from megatron_demix.errors import ConfigError, OutputExists, storage_errors

HEURISTICS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
MANIFEST = "clean.json"


@dataclass(frozen=True)
class CleanSpec:
    """heuristics: of HEURISTICS, in this order. bands x hashes MinHashes over ngram-word shingles; ngram 0: keep duplicates.
    Documents shorter than `ngram` words have no shingle and are never taken for duplicates."""

    heuristics: tuple[str, ...] = ()
    ngram: int = 24
    bands: int = 20
    hashes: int = 13
    seed: int = 1


def clean_domains(
    inputs: Mapping[str, Sequence[Path]], output: Path, spec: CleanSpec, *, json_key: str = "text", workers: int = 1
) -> dict[str, Any]:
    """Write `output`/<domain>/*.jsonl.gz of what is kept, `output`/removed/<reason>/*.jsonl.gz of the rest, and clean.json.

    inputs: JSON Lines files by domain; of duplicates across domains the first domain keeps its own. Returns clean.json:
    {"domains": {name: {"documents", "kept", "removed": {reason: n}}}, "settings"}. Raises ConfigError, OutputExists,
    StorageError.
    """
    if unknown := [name for name in spec.heuristics if name not in HEURISTICS]:
        raise ConfigError(f"heuristic {unknown[0]!r} is not one of {', '.join(HEURISTICS)}.")
    output = Path(output)
    if output.exists():
        raise OutputExists(f"{output} exists. Move it away or choose another output; nothing is overwritten.")
    steps = _Steps(inputs, output.with_name(f".{output.name}.work"), spec, json_key, workers)
    with storage_errors(f"writing {output}"):
        shutil.rmtree(steps.work, ignore_errors=True)
        steps.filter()
        if spec.ngram:
            steps.remove_duplicates()
        counts = {name: _count(steps.work, name) for name in inputs}
        report = {"settings": asdict(spec), "domains": counts}
        for scratch in ("filtered", "minhash", "logs"):
            shutil.rmtree(steps.work / scratch, ignore_errors=True)
        write_json(steps.work / MANIFEST, report)
        steps.work.rename(output)
    return report


class _Steps:
    """datatrove pipelines, each run to its end by its local executor (which skips tasks that a killed run had finished)."""

    def __init__(self, inputs: Mapping[str, Sequence[Path]], work: Path, spec: CleanSpec, key: str, workers: int) -> None:
        self.inputs, self.work, self.spec, self.key, self.workers = inputs, work, spec, key, workers
        self.words = _blank_separated()

    def _run(self, name: str, pipeline: list[Any], tasks: int = 1) -> None:
        from datatrove.executor import LocalPipelineExecutor

        logs = str(self.work / "logs" / name)
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=min(tasks, self.workers), logging_dir=logs).run()

    def _writer(self, folder: Path) -> Any:
        from datatrove.pipeline.writers import JsonlWriter

        return JsonlWriter(str(folder), output_filename="${domain}/${rank}.jsonl.gz")

    def filter(self) -> None:
        """Everything through the heuristics; what passes lies in filtered/<domain>, or in <domain> if duplicates may stay."""
        from datatrove.pipeline.readers import JsonlReader

        readers = []
        for name, files in self.inputs.items():
            for number, file in enumerate(files):
                about = {"domain": name, "source": file.name}
                readers.append(
                    JsonlReader(
                        str(file.parent),
                        glob_pattern=file.name,
                        text_key=self.key,
                        id_key=f"no id {number}",
                        default_metadata=about,
                    )
                )
        filters = [self._heuristic(name) for name in self.spec.heuristics]
        kept = self.work / ("filtered" if self.spec.ngram else "")
        self._run("filter", [*readers, *filters, self._writer(kept)])

    def _heuristic(self, name: str) -> Any:
        from datatrove.pipeline import filters

        kind = {
            "gopher_repetition": filters.GopherRepetitionFilter,
            "gopher_quality": filters.GopherQualityFilter,
            "c4": filters.C4QualityFilter,
            "fineweb": filters.FineWebQualityFilter,
        }[name]
        return kind(language=self.words, exclusion_writer=self._writer(self.work / "removed" / name))

    def _reread(self) -> list[Any]:
        from datatrove.pipeline.readers import JsonlReader

        return [JsonlReader(str(self.work / "filtered" / n)) for n in self.inputs if (self.work / "filtered" / n).is_dir()]

    def remove_duplicates(self) -> None:
        from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
        from datatrove.pipeline.dedup.minhash import MinhashConfig
        from datatrove.utils.hashing import HashConfig

        spec, folder = self.spec, self.work / "minhash"
        # SHA-1, because datatrove 0.10 hands strings to xxhash, which takes bytes only from its version 4 on.
        config = MinhashConfig(spec.ngram, spec.bands, spec.hashes, spec.seed, hash_config=HashConfig(64, "sha1"))
        signatures, buckets, removals = (str(folder / n) for n in ("signatures", "buckets", "removals"))
        self._run("signatures", [*self._reread(), MinhashDedupSignature(signatures, config=config, language=self.words)])
        self._run("buckets", [MinhashDedupBuckets(signatures, buckets, config=config)], tasks=spec.bands)
        self._run("cluster", [MinhashDedupCluster(buckets, removals, config=config)])
        removed = self._writer(self.work / "removed" / "duplicate")
        self._run("remove", [*self._reread(), MinhashDedupFilter(removals, exclusion_writer=removed), self._writer(self.work)])


def _blank_separated() -> Any:
    """Words between blanks, sentences by Punkt's rules: datatrove's own splitters need spaCy or a download, and shingles of 24
    words do not depend on finer cuts."""
    try:
        from datatrove.utils.word_tokenizers import WordTokenizer
    except ImportError as e:
        raise ConfigError("datatrove is not installed: pip install 'megatron-demix[data]'.") from e
    from megatron_demix.data.sentences import punkt

    split = punkt()

    class BlankSeparated(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [sentence.strip() for sentence in split(text) if sentence.strip()]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            raise NotImplementedError("no step used here asks for spans")

    return BlankSeparated()


def _count(work: Path, domain: str) -> dict[str, Any]:
    kept = sum(_lines(p) for p in (work / domain).glob("*.jsonl.gz"))
    removed: Counter[str] = Counter()
    for reason in sorted((work / "removed").glob("*")):
        if found := sum(_lines(p) for p in (reason / domain).glob("*.jsonl.gz")):
            removed[reason.name] = found
    return {"documents": kept + sum(removed.values()), "kept": kept, "removed": dict(removed)}


def _lines(path: Path) -> int:
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") as file:
        return sum(1 for line in file if json.loads(line))
