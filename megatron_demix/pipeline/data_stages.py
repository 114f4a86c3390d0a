"""Stages from text to indexed data: the tokenizer, and each domain's train/valid/test split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_demix.artifact import read_json, write_json
from megatron_demix.errors import ConfigError, CorruptInput
from megatron_demix.pipeline.inputs import InputDigests
from megatron_demix.pipeline.stage import Stage
from megatron_demix.study import DomainSpec, Study

STATS = "stats.json"
SPLITS: tuple[Literal["train", "valid", "test"], ...] = ("train", "valid", "test")


def resolve(spec: DomainSpec, root: Path) -> list[Path]:
    """A domain's input files: its text, or the .bin and .idx files of its prefixes."""
    from megatron_demix.data.prepare import resolve_inputs

    if spec.prefixes is None:
        return resolve_inputs(spec.inputs, root)
    files = [
        root / f"{prefix}{suffix}" for split in SPLITS for prefix in spec.prefixes.get(split, []) for suffix in (".bin", ".idx")
    ]
    for file in files:
        if not file.is_file():
            raise CorruptInput(f"domain {spec.name!r}: {file} does not exist; prefixes are paths without .bin/.idx.")
    for split in SPLITS:
        if not spec.prefixes.get(split):
            raise CorruptInput(f"domain {spec.name!r}: no prefix for split {split!r}; train, valid and test are all needed.")
    return files


def tokenizer(study: Study, root: Path, run: Path, inputs: Mapping[str, list[Path]], digests: InputDigests) -> Stage:
    spec = study.tokenizer
    if spec.model is not None:
        model = root / spec.model
        if not model.exists() and not digests.absent_ok:
            raise ConfigError(f"tokenizer.model: {model} does not exist; a relative path starts at the study file's folder.")
        spec = spec.model_copy(update={"model": model})
    settings: dict[str, Any] = spec.model_dump(exclude={"model", "domains"}, mode="json")
    sampled = spec.domains or study.domain_names
    samples = {d.name: inputs[d.name] for d in study.domains if d.prefixes is None and d.name in sampled}
    if spec.type == "bpe":
        settings["inputs"] = {name: digests.of(paths) for name, paths in samples.items()}
    elif spec.model:
        settings["model"] = digests.of(sorted(spec.model.iterdir()) if spec.model.is_dir() else [spec.model])

    def make(folder: Path) -> None:
        from megatron_demix.data.tokenizer import train_tokenizer

        train_tokenizer(spec, samples, folder, json_key={d.name: d.json_key for d in study.domains})

    return Stage(f"tokenizer/{spec.type}", run, settings, (), make)


def domain(study: Study, spec: DomainSpec, run: Path, inputs: list[Path], tokenizer: Stage, digests: InputDigests) -> Stage:
    settings: dict[str, Any]
    if spec.prefixes is not None:
        # A .bin may be terabytes: its size and the digest of its .idx (every document's length and place) stand for it.
        index_files = [file for file in inputs if file.suffix == ".idx"]
        settings = {"inputs": digests.of(index_files), "bytes": [f.with_suffix(".bin").stat().st_size for f in index_files]}
    else:
        settings = {"inputs": digests.of(inputs), "json_key": spec.json_key, "split": study.prepare.split, "seed": study.seed}

    def make(folder: Path) -> None:
        from megatron_demix.data.prepare import prepare_domain
        from megatron_demix.data.tokenizer import load_tokenizer

        if spec.prefixes is not None:
            write_json(folder / STATS, _stats_of_prefixes(spec, inputs))
            return
        prepare_domain(
            inputs,
            load_tokenizer(tokenizer.folder),
            folder,
            json_key=spec.json_key,
            split=study.prepare.split,
            seed=study.seed,
            workers=study.prepare.workers,
            progress=False,
        )

    return Stage(f"data/{spec.name}", run, settings, (tokenizer,), make)


def _stats_of_prefixes(spec: DomainSpec, files: list[Path]) -> dict[str, Any]:
    from megatron_demix.indexed.reader import read_index

    prefixes = iter([file.with_suffix("") for file in files if file.suffix == ".idx"])
    stats: dict[str, Any] = {"splits": {}, "prefixes": {}}
    for split in SPLITS:
        own = [next(prefixes) for _ in (spec.prefixes or {})[split]]
        indexes = [read_index(prefix) for prefix in own]
        stats["prefixes"][split] = [str(prefix.resolve()) for prefix in own]
        stats["splits"][split] = {
            "documents": sum(i.num_documents for i in indexes),
            "tokens": sum(int(i.lengths.sum()) for i in indexes),
        }
    return stats


def prefixes(data: Stage, split: str) -> list[Path]:
    """Indexed prefixes of one split of a finished data stage."""
    given = read_json(data.folder / STATS).get("prefixes")
    return [Path(p) for p in given[split]] if given else [data.folder / split]


def tokens(data: Mapping[str, Stage], split: str) -> dict[str, int]:
    """Tokens of one split, by domain, of finished data stages."""
    return {name: read_json(stage.folder / STATS)["splits"][split]["tokens"] for name, stage in data.items()}
