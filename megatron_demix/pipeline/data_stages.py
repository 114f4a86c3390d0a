"""Stages from text to indexed data: the tokenizer, and each domain's train/valid/test split."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_demix.artifact import read_json, write_json
from megatron_demix.data.clean import REVISION
from megatron_demix.data.input_files import Look, facts_of, resolve_inputs
from megatron_demix.data.pool import Source, open_pool
from megatron_demix.data.prepare import STATS, prepare_domain
from megatron_demix.data.tokenizer import META, Tokenizer, load_tokenizer, source_files, train_tokenizer
from megatron_demix.errors import ConfigError, CorruptInput, DemixError, IncompatibleInputs
from megatron_demix.indexed.format import token_dtype
from megatron_demix.indexed.reader import read_index
from megatron_demix.pipeline.inputs import InputDigests
from megatron_demix.pipeline.stage import Stage
from megatron_demix.study.data import SPLITS, DomainSpec
from megatron_demix.study.study import Study
from megatron_demix.train.derived import padded_vocab_size


def resolve(spec: DomainSpec, root: Path, look: Look) -> list[Path]:
    """A domain's input files: its text, or the .bin and .idx files of its prefixes."""
    if spec.prefixes is None:
        return resolve_inputs(spec.inputs, root, look)
    files = [
        root / f"{prefix}{suffix}" for split in SPLITS for prefix in spec.prefixes.get(split, []) for suffix in (".bin", ".idx")
    ]
    for file in files:
        facts = facts_of(file, look)
        if facts is None or not stat.S_ISREG(facts.st_mode):
            raise CorruptInput(f"domain {spec.name!r}: {file} does not exist; prefixes are paths without .bin/.idx.")
    for split in SPLITS:
        if not spec.prefixes.get(split):
            raise CorruptInput(f"domain {spec.name!r}: no prefix for split {split!r}; train, valid and test are all needed.")
    return files


def check_prefixes(study: Study, root: Path) -> None:
    """Raises ConfigError where indexed data is named twice, under whatever paths. Nothing is read, and it may be absent."""
    seen: dict[str, str] = {}
    for spec in study.domains:
        for split in SPLITS:
            for prefix in (spec.prefixes or {}).get(split, []):
                real, place = os.path.realpath(root / f"{prefix}.bin"), f"split {split!r} of domain {spec.name!r}"
                if real in seen:
                    raise ConfigError(
                        f"{place}: {prefix} is given twice, also as {seen[real]}. What is trained on must not score, and a "
                        "domain's data is its own: give each split and each domain data of its own."
                    )
                seen[real] = place


def clean(study: Study, root: Path, run: Path, inputs: Mapping[str, list[Path]], digests: InputDigests) -> Stage | None:
    """All domains of text at once, since duplicates are looked for across them; None if the study cleans nothing."""
    spec = study.prepare.clean
    texts = {d.name: inputs[d.name] for d in study.domains if d.prefixes is None}
    if spec is None or not texts:
        return None
    spec = spec.under(root)
    json_keys = {d.name: d.json_key for d in study.domains}
    settings = spec.model_dump(mode="json", exclude={"perplexity": {"model", "sentencepiece"}, "quality": {"model"}})
    settings |= {"revision": REVISION, "on_bad_document": study.prepare.on_bad_document}
    digests.read(file for files in texts.values() for file in files)
    # In the study's order: of one text in several domains, the first one keeps its own.
    settings |= {"inputs": [[name, json_keys[name], digests.of(files)] for name, files in texts.items()]}
    for place, path in spec.models():
        if not path.is_file() and digests.absent == "refused":
            raise ConfigError(
                f"prepare.clean.{place}: {path} does not exist; a relative path starts at the study file's folder."
            )
        settings[place] = digests.of([path])
    if spec.contamination:

        def digest(files: list[str]) -> str:
            question = json.dumps([str(root), files])
            return digests.answer(question, lambda: digests.of(resolve_inputs(files, root, digests.look)), kind="task items")

        settings["tasks"] = {task: digest(files) for task, files in spec.contamination.tasks.items()}
        settings["contamination"].pop("tasks")

    def make(folder: Path) -> None:
        from megatron_demix.data.clean.run import clean_domains

        clean_domains(
            texts,
            folder,
            spec,
            json_keys=json_keys,
            on_bad_document=study.prepare.on_bad_document,
            root=root,
            work=stage.work,
            workers=study.prepare.workers,
            progress=False,
        )

    stage = Stage("clean/text", run, settings, (), make)
    return stage


def text_of(spec: DomainSpec, inputs: list[Path], cleaned: Stage | None) -> list[Path]:
    """A domain's files as they are tokenized; of a cleaning only once it is done."""
    if cleaned is None or spec.prefixes is not None:
        return inputs
    files = sorted((cleaned.folder / spec.name).glob("*.jsonl.zst"))
    if not files:
        raise ConfigError(f"domain {spec.name!r}: the cleaning kept none of its documents; {cleaned.folder} says why.")
    return files


def tokenizer(
    study: Study, root: Path, run: Path, inputs: Mapping[str, list[Path]], digests: InputDigests, cleaned: Stage | None = None
) -> Stage:
    spec = study.tokenizer
    if spec.model and not spec.model.exists() and digests.absent == "refused":
        raise ConfigError(f"tokenizer.model: {spec.model} does not exist; a relative path starts at the study file's folder.")
    settings: dict[str, Any] = spec.model_dump(exclude={"model", "domains"}, mode="json")
    sampled = spec.domains or study.domain_names
    samples = [d for d in study.domains if d.prefixes is None and d.name in sampled]
    needs: tuple[Stage, ...] = ()
    if spec.type == "bpe" and cleaned:
        settings["domains"] = [d.name for d in samples]
        needs = (cleaned,)
    elif spec.type == "bpe":
        digests.read(file for d in samples for file in inputs[d.name])
        settings["inputs"] = {d.name: [d.json_key, digests.of(inputs[d.name])] for d in samples}
        settings["on_bad_document"] = study.prepare.on_bad_document
    elif model := spec.model:
        settings["model"] = digests.answer(
            f"{spec.type} {model}", lambda: digests.of(source_files(spec.type, model)), kind="tokenizer"
        )

    def make(folder: Path) -> None:
        texts = {d.name: text_of(d, inputs[d.name], cleaned if needs else None) for d in samples}
        keys = {d.name: d.json_key for d in study.domains}
        train_tokenizer(spec, texts, folder, json_key=keys, on_bad_document=study.prepare.on_bad_document)

    stage = Stage(f"tokenizer/{spec.type}", run, settings, needs, make, check=lambda: check_rows(study, stage))
    return stage


def num_ids(study: Study, tokenizer: Stage) -> int:
    """Of the tokenizer that is there, or will be: of one that is to be trained, what is asked for. Raises as load_tokenizer."""
    if tokenizer.is_intact():
        found: int = read_json(tokenizer.folder / META)["vocab_size"]
        return found
    return study.tokenizer.train_vocab_size if study.tokenizer.type == "bpe" else load_tokenizer(study.tokenizer).vocab_size


def check_rows(study: Study, tokenizer: Stage) -> None:
    """Raises ConfigError where the embedding, as the study says it or its base has it, has fewer rows than the tokenizer has
    ids, or tensor parallelism does not divide it. What cannot be read of a tokenizer is said when that is made."""
    rows, ids = study.model.padded_vocab_size, 0
    if rows is None:
        return
    with suppress(DemixError):
        ids = num_ids(study, tokenizer)
    try:
        padded_vocab_size(study.model, study.parallel, ids)
    except ConfigError as e:
        advice = "give the study the tokenizer of its base, whose rows they are by default"
        if study.base.tokens is not None:
            advice = f"set tokenizer.train_vocab_size to at most {rows}" if study.tokenizer.type == "bpe" else ""
        if rows >= ids or not advice:
            raise
        raise ConfigError(f"{e} Or {advice}.") from e


def domain(
    study: Study,
    spec: DomainSpec,
    run: Path,
    inputs: list[Path],
    tokenizer: Stage,
    digests: InputDigests,
    cleaned: Stage | None = None,
) -> Stage:
    settings: dict[str, Any]
    needs: tuple[Stage, ...] = (tokenizer,)
    if spec.prefixes is not None:
        settings = {"inputs": digests.of(inputs)}
    else:
        settings = {"json_key": spec.json_key, "split": study.prepare.split, "seed": study.seed}
        if cleaned:
            needs = (tokenizer, cleaned)
        else:
            settings |= {"inputs": digests.of(inputs), "on_bad_document": study.prepare.on_bad_document}

    def prepare(folder: Path, part: tuple[int, int] | None = None) -> None:
        texts = text_of(spec, inputs, cleaned)
        try:
            prepare_domain(
                texts,
                load_tokenizer(tokenizer.folder),
                folder,
                json_key=spec.json_key,
                split=study.prepare.split,
                seed=study.seed,
                workers=study.prepare.workers,
                on_bad_document=study.prepare.on_bad_document,
                part=part,
                progress=False,
            )
        except ConfigError as e:
            if cleaned is None:
                raise
            raise ConfigError(f"domain {spec.name!r}, {_left_by_cleaning(spec.name, cleaned)}: {e}") from e

    def check() -> None:
        if tokenizer.is_intact():  # else it has been asked itself
            check_rows(study, tokenizer)

    if spec.prefixes is not None:
        given = _given_prefixes(spec, inputs)

        def describe(folder: Path) -> None:
            own = load_tokenizer(tokenizer.folder)
            write_json(folder / STATS, {"splits": {split: _counts(study, spec, split, given[split], own) for split in SPLITS}})

        return Stage(f"data/{spec.name}", run, settings, needs, describe, check=check, stands_for=given)
    return Stage(f"data/{spec.name}", run, settings, needs, prepare, make_part=prepare, check=check)


def _left_by_cleaning(name: str, cleaned: Stage) -> str:
    account = cleaned.folder / "clean.json"
    entry = read_json(account)["domains"][name]
    kept = sum(counts["documents"] for counts in entry["kept"].values())
    return f"of which cleaning (prepare.clean) kept {kept} of {entry['documents']} documents, see {account}"


def _given_prefixes(spec: DomainSpec, files: list[Path]) -> dict[str, list[Path]]:
    """By split, of files as resolve() gives them."""
    prefixes = iter([file.with_suffix("").resolve() for file in files if file.suffix == ".idx"])
    return {split: [next(prefixes) for _ in (spec.prefixes or {})[split]] if files else [] for split in SPLITS}


def _counts(study: Study, spec: DomainSpec, split: str, prefixes: list[Path], tokenizer: Tokenizer) -> dict[str, int]:
    """Documents and tokens of one split. Raises IncompatibleInputs where it is not what this tokenizer would have made, and all
    that open_pool does: the final blend would refuse it, after the whole search. A split that nothing scores may be empty."""
    if split != "train" and not any(read_index(prefix).num_tokens for prefix in prefixes):
        return {"documents": 0, "tokens": 0}
    pool = open_pool({spec.name: Source(tuple(prefixes))})
    if pool.tokenizer and pool.tokenizer not in tokenizer.fingerprints:
        raise IncompatibleInputs(
            f"domain {spec.name!r}, split {split!r}: {prefixes[0]} was made with tokenizer {pool.tokenizer}, the study's is "
            f"{tokenizer.fingerprint}. Their ids mean different things: give the study that tokenizer, or prepare the data "
            "again."
        )
    # Ids may be stored wider than they have to be, but not beside a domain's that the study tokenizes.
    own, among = token_dtype(tokenizer.vocab_size), any(domain.prefixes is None for domain in study.domains)
    if pool.dtype.itemsize < own.itemsize or (among and pool.dtype != own):
        raise IncompatibleInputs(
            f"domain {spec.name!r}, split {split!r}: {prefixes[0]} holds {pool.dtype} tokens, expected {own}, which the "
            f"study's tokenizer with its {tokenizer.vocab_size} ids gives. Give the study the tokenizer that the data was made "
            "with, or prepare the data again."
        )
    indexed = pool.domains[spec.name]
    return {"documents": sum(index.num_documents for index in indexed.indexes), "tokens": indexed.tokens}


def prefixes(data: Stage, split: str) -> list[Path]:
    """Indexed prefixes of one split of a finished data stage."""
    return list(data.stands_for[split]) if isinstance(data.stands_for, Mapping) else [data.folder / split]


def splits(data: Stage) -> dict[str, dict[str, int]]:
    """ "documents" and "tokens" of each split of a finished data stage, and "bytes" of its text where there was text."""
    found: dict[str, dict[str, int]] = read_json(data.folder / STATS)["splits"]
    return found


def tokens(data: Mapping[str, Stage], split: str) -> dict[str, int]:
    """Tokens of one split, by domain, of finished data stages."""
    return {name: splits(stage)[split]["tokens"] for name, stage in data.items()}
