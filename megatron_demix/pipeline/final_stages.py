"""After the search: blends of the chosen and the baseline mixtures, final runs on them, and their scores on the test split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_demix.artifact import read_json
from megatron_demix.mixture import Mixture
from megatron_demix.pipeline import data_stages, preflight, train_stages
from megatron_demix.pipeline.foundation import Foundation, Ground
from megatron_demix.pipeline.merging import merge_settings, method_of, normalization, second_order
from megatron_demix.pipeline.scoring import scoring
from megatron_demix.pipeline.search_stages import CHOICE
from megatron_demix.pipeline.stage import Stage
from megatron_demix.report.data import FOUND
from megatron_demix.study.study import Study

BLEND = "blend"
PROXIES = "merge/proxies"


def _mixtures(study: Study) -> list[str]:
    return [FOUND, *study.final.baselines]


def _shares(study: Study, name: str, data: Mapping[str, Stage], choice: Stage) -> Mixture:
    """Actual data shares of one of the final mixtures."""
    if name == FOUND:
        return Mixture(read_json(choice.folder / CHOICE)["weights"], label=FOUND)
    return study.mixture(name, data_stages.tokens(data, "train"), name)  # type: ignore[arg-type]


def blends(ground: Ground, choice: Stage) -> dict[str, Stage]:
    """One indexed data set per final mixture, as large as the final run needs."""
    study, data = ground.study, ground.data
    target = train_stages.blend_tokens(study)

    def blend(name: str) -> Stage:
        def make(folder: Path, part: tuple[int, int] | None = None) -> None:
            from megatron_demix.data.blend import build_blend
            from megatron_demix.data.pool import Pool, Source

            pool = Pool(
                {d.name: Source(tuple(data_stages.prefixes(data[d.name], "train")), d.max_epochs) for d in study.domains}
            )
            shares = _shares(study, name, data, choice)
            build_blend(
                pool,
                shares,
                target,
                folder / BLEND,
                mode=study.final.blend,
                seed=study.seed,
                worker=part,
                label=f"blend/{name}",
                progress=False,
            )

        def check() -> None:
            if name != FOUND:  # which the search keeps within what there is
                shares, other = _shares(study, name, data, choice), f"leave {name} out of final.baselines"
                preflight.check_filled(study, f"stage blend/{name}", shares, target, data, "final.tokens", other)

        settings = {
            "mixture": name,
            "target_tokens": target,
            "mode": study.final.blend,
            "max_epochs": {d.name: d.max_epochs for d in study.domains},
            "seed": study.seed,
        }
        needs = (*data.values(), *([choice] if name == FOUND else []))
        make_part = make if study.final.blend == "materialise" else None
        return Stage(f"blend/{name}", ground.run, settings, needs, make, make_part=make_part, check=check)

    return {name: blend(name) for name in _mixtures(study)}


def finals(ground: Ground, blends: Mapping[str, Stage]) -> dict[str, Stage]:
    """Final runs by "<mixture>-seed<n>": every mixture, every seed, the same budget."""
    study, tokenizer = ground.study, ground.tokenizer
    start = ground.base if study.final.init == "base" else None

    def final(name: str, number: int) -> Stage:
        return train_stages.training(
            study,
            ground.run,
            f"final/{name}-seed{number}",
            "final",
            train_stages.Filling(lambda: [(blends[name].folder / BLEND, 1.0)]),
            needs=(tokenizer, blends[name], *([start] if start else [])),
            tokenizer=tokenizer,
            settings={"init": study.final.init},
            seed=study.seed + number,
            start=start,
        )

    return {f"{name}-seed{n}": final(name, n) for n in range(study.final.seeds) for name in _mixtures(study)}


def proxies(foundation: Foundation, choice: Stage) -> Stage:
    """The found mixture's proxy as a checkpoint on disk, by the engine behind tools/merge_dist_ckpt.py."""
    study, base, components = foundation.study, foundation.base, foundation.merged

    def make(folder: Path) -> None:
        from megatron_demix.merge.engine import merge_checkpoints

        merge_checkpoints(
            {n: train_stages.checkpoint_of(c) for n, c in components.items()},
            {FOUND: second_order(study).of(read_json(choice.folder / CHOICE)["merge_weights"])},
            folder / "proxies",
            normalize=normalization(study),
            threads=study.merge.threads,
            method=method_of(study.merge, train_stages.checkpoint_of(base), study.seed),
            progress=False,
        )

    return Stage(PROXIES, foundation.run, merge_settings(study), (choice, base, *components.values()), make)


def found_proxy(merging: Stage) -> Path:
    """The checkpoint that the stage PROXIES makes."""
    return merging.folder / "proxies" / FOUND


def scores(foundation: Foundation, finals: Mapping[str, Stage], proxies: Stage | None) -> Stage:
    """The final models, the base and the found proxy (where it was merged) on the test split, which nothing before has looked
    at."""

    base = foundation.base

    def models() -> dict[str, Any]:
        return {
            "checkpoints": {
                "base": train_stages.checkpoint_of(base),
                **({"proxy": found_proxy(proxies)} if proxies else {}),
                **{name: stage.folder for name, stage in finals.items()},
            }
        }

    needs = (base, *([proxies] if proxies else []), *finals.values())
    return scoring(foundation, "final/scores", "test", foundation.tasks.final, needs, models, lambda: len(needs))
