"""Publishing a planned blend: made in a working folder beside its target, then renamed into place, the manifest last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_demix.artifact import hash_file, only_maker, read_json, sync_path, write_atomic, write_json
from megatron_demix.data import blend_data
from megatron_demix.data.prefix import publish_files
from megatron_demix.errors import ConfigError, CorruptInput, OutputExists, storage_errors

if TYPE_CHECKING:
    from megatron_demix.data.blend import BlendPlan
    from megatron_demix.data.pool import Domain

MANIFEST_SUFFIX = ".blend.json"
_DATA = (".bin", blend_data.DOMAINS_SUFFIX, ".idx")
_SUFFIXES = {"view": _DATA, "materialise": _DATA, "args": (".args.json", ".args.txt")}
"""Of a blend's own files, by mode: beside them in the working folder may lie others that begin with its name."""


def manifest_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}{MANIFEST_SUFFIX}")


def read_manifest(prefix: Path | str) -> dict[str, Any] | None:
    """The manifest of a finished blend, or None. Raises CorruptInput if it is damaged or a file has another size."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("kind") != "blend" or not isinstance(manifest.get("files"), dict):
        raise CorruptInput(f"{path}: not the manifest of a blend.")
    for suffix, facts in manifest["files"].items():
        file = Path(f"{prefix}{suffix}")
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"]:
            seen = "is missing" if size is None else f"has {size} bytes"
            raise CorruptInput(
                f"blend {prefix}: {file.name} {seen}, expected {facts['bytes']} bytes. Build it again elsewhere."
            )
    return manifest


def write(
    plan: BlendPlan,
    manifest: dict[str, Any],
    output: Path,
    *,
    threads: int,
    progress: bool,
    worker: tuple[int, int] | None = None,
    pool_cache: Path | None = None,
) -> dict[str, Any]:
    """Write the blend's files and publish them with their manifest, which is returned.

    worker (i, n): write every n-th shard of a materialised blend; who finds all shards written publishes, the others get
    a manifest without files. Raises OutputExists, StorageError, CorruptInput.
    """
    mode, work = manifest["mode"], output.parent / f".{output.name}.work-{manifest['key']}"
    arguments = _arguments(plan) if mode == "args" else {}
    with storage_errors(f"writing blend {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with only_maker(output):
            if done := _finished(output, manifest["key"], work):
                return done
            work.mkdir(exist_ok=True)
            if mode != "args" and not _is_sealed(work, output):
                blend_data.write_plan(plan, work, threads)
        if mode == "materialise" and worker is not None and not _is_sealed(work, output):
            # Shards of different workers do not overlap, so they are written without the lock.
            blend_data.write_shards(plan, work, output.name, worker, threads=threads, progress=progress)
        with only_maker(output):
            if done := _finished(output, manifest["key"], work):
                return done
            if not _is_sealed(work, output):
                facts: dict[str, Any] | None = {}
                if mode == "args":
                    for suffix, text in arguments.items():
                        write_atomic(work / f"{output.name}{suffix}", text)
                elif mode == "view":
                    facts = blend_data.finish_view(plan, work, output.name, manifest["pool"], pool_cache, progress=progress)
                else:
                    if worker is None:
                        blend_data.write_shards(plan, work, output.name, (0, 1), threads=threads, progress=progress)
                    facts = blend_data.finish_materialised(plan, work, output.name)
                if facts is None:
                    return manifest | {"files": {}}
                _seal(work, output.name, manifest | facts)
            _publish(work, output)
            return read_manifest(output) or manifest


def _finished(output: Path, key: str, work: Path) -> dict[str, Any] | None:
    done = read_manifest(output)
    if done is not None and done["key"] != key:
        raise OutputExists(
            f"blend {output} exists with key {done['key']}, expected {key}: it was built from other data or settings. Choose "
            "another output; nothing is overwritten."
        )
    if done is not None:
        shutil.rmtree(work, ignore_errors=True)  # of one that was killed after its last rename
    return done


def _is_sealed(work: Path, output: Path) -> bool:
    return manifest_path(work / output.name).is_file()


def _seal(work: Path, name: str, manifest: dict[str, Any]) -> None:
    """Make the blend's files in `work` last, and write the manifest that counts them."""
    facts = {}
    for suffix in _SUFFIXES[manifest["mode"]]:
        file = work / f"{name}{suffix}"
        sync_path(file)
        # verify_blend reads the .bin again; its digest here would cost a second pass over it.
        facts[suffix] = {"bytes": file.stat().st_size} | ({} if suffix == ".bin" else {"blake2b": hash_file(file)})
    write_json(manifest_path(work / name), manifest | {"files": facts})


def _publish(work: Path, output: Path) -> None:
    """The manifest last."""
    sealed = manifest_path(work / output.name)
    publish_files(work, output.parent, [*(f"{output.name}{suffix}" for suffix in read_json(sealed)["files"]), sealed.name])
    shutil.rmtree(work)


def _arguments(plan: BlendPlan) -> dict[str, str]:
    """The blend as Megatron's arguments, by suffix: .args.txt for --data-args-path, .args.json for --per-split-data-args-path.

    Raises ConfigError for a path with a blank, at which Megatron would cut the text file.
    """
    splits = megatron_words({p.domain.name: p.planned for p in plan.parts}, plan.pool.domains)
    for chosen in splits.values():
        for prefix in (chosen or [])[1::2]:
            if len(prefix.split()) != 1:
                raise ConfigError(
                    f"{prefix!r} has a blank in it, at which Megatron's --data-args-path would cut it. Move or link the data "
                    "to another path, or build a view."
                )
    train = splits["train"] or []
    lines = (f"{weight} {prefix}\n" for weight, prefix in zip(train[::2], train[1::2], strict=True))
    return {".args.txt": "".join(lines), ".args.json": json.dumps(splits, indent=1) + "\n"}


def megatron_words(planned: Mapping[str, int], domains: Mapping[str, Domain]) -> dict[str, list[str] | None]:
    """Weights and prefixes in turn, for each of Megatron's splits. planned: tokens by domain.

    A weight is a share of samples; the data sets of one domain share its weight in proportion to their tokens. None is zero:
    Megatron dies on those. All three splits are there, which Megatron asks for; valid and test hold the domains that name such
    data, with equal weights, and are None (no data) where none does.
    """
    total = sum(planned.values())
    pairs = {"train": _weighted({name: tokens / total for name, tokens in planned.items()}, domains)}
    for split in ("valid", "test"):
        held_out = [prefixes for name in planned if (prefixes := getattr(domains[name], split))]
        pairs[split] = [(f"{1 / len(held_out) / len(ps):.17g}", str(q.resolve())) for ps in held_out for q in ps]
    return {split: [word for pair in given for word in pair] or None for split, given in pairs.items()}


def _weighted(shares: Mapping[str, float], domains: Mapping[str, Domain]) -> list[tuple[str, str]]:
    return [
        (f"{share * index.num_tokens / domains[name].tokens:.17g}", str(Path(index.prefix).resolve()))
        for name, share in shares.items()
        for index in domains[name].indexes
        if share * index.num_tokens > 0
    ]
