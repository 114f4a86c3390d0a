"""Proxies of an earlier study, of other domains: which of their scores count in this one, and what their mixtures are here.

A score counts if this study would have measured the same: the same base, components trained and merged in the same way, the
same text and evaluation. A proxy then is an observation at its actual shares: 0 of a domain that was added, some of one that
was dropped, and of one that was split as much of each domain it became as that has of its tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_demix.artifact import read_json, write_json
from megatron_demix.errors import ConfigError, IncompatibleInputs
from megatron_demix.evaluate.job import SCORES
from megatron_demix.evaluate.scores import Score, ScoreTable
from megatron_demix.merge.second_order import SecondOrder
from megatron_demix.pipeline import data_stages
from megatron_demix.pipeline.comparable import reasons_against, score_names, scores_left_out
from megatron_demix.pipeline.foundation import Foundation
from megatron_demix.pipeline.merging import second_order
from megatron_demix.pipeline.scoring import component_row, scores_proxies
from megatron_demix.pipeline.stage import Stage
from megatron_demix.pipeline.train_stages import MIXTURES
from megatron_demix.study.search import EarlierSpec
from megatron_demix.study.section import nearest

if TYPE_CHECKING:
    from megatron_demix.pipeline.dag import Dag


@dataclass(frozen=True)
class Earlier:
    """What is used of one earlier study. stage: its artifact holds mixtures.json and scores.json, in the terms of this study.

    num_proxies: at most. scores: those that count. left_out: by score of this study that does not, why. same: domains that are
    what they were. dropped: by name, what the column of their shares is called.
    """

    label: str
    stage: Stage
    num_proxies: int
    scores: Sequence[str]
    left_out: Mapping[str, str]
    same: Sequence[str]
    split: Mapping[str, Sequence[str]]
    dropped: Mapping[str, str]
    second_order: SecondOrder
    """Of its own weights."""

    def row(self, model: str) -> str:
        """What one of its models is called here."""
        return f"{self.label}/{model}"

    @property
    def facts(self) -> dict[str, Any]:
        """For fit.json."""
        return {
            "scores": list(self.scores),
            "left_out": dict(self.left_out),
            "split": {name: list(domains) for name, domains in self.split.items()},
            "dropped": list(self.dropped),
        }

    def said(self, proxies: str) -> str:
        """proxies: how many, in words."""
        lacking = "".join(f"; not {score}: {why}" for score, why in self.left_out.items())
        gone = f"; shares of {', '.join(self.dropped)}, no domain here, are a feature" if self.dropped else ""
        return f"{self.label}: {proxies}, with {', '.join(self.scores)}{lacking}{gone}"


def label_of(spec: EarlierSpec) -> str:
    """What the rows and the stage of an earlier study are called here: the name of its file."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", spec.study.stem)


def earlier(spec: EarlierSpec, here: Foundation, there: Dag, *, absent_ok: bool = False) -> Earlier:
    """here: this study; there: all stages of the earlier one, of which none is run.

    Raises IncompatibleInputs naming every difference where no score counts, ConfigError where the spec does not fit both
    studies or the earlier one is not done. absent_ok: without inputs neither is known, so neither is an error.
    """
    label, used = label_of(spec), there.rounds[: spec.rounds]
    if len(used) < (spec.rounds or 0):
        raise ConfigError(f"search.earlier: {label} has {len(used)} rounds, not {spec.rounds}.")
    became = _what_became(label, spec, here, there)
    left_out = dict(scores_left_out(here, there))
    scores = [name for name in score_names(here) if name not in left_out]
    unlike = list(reasons_against(here, there))
    if (unlike or not scores) and not absent_ok:
        reasons = unlike or [f"{name}: {why}" for name, why in left_out.items()]
        raise IncompatibleInputs(
            f"search.earlier: nothing that {label} measured would be the same here. Make the studies agree, or take it out:\n"
            + "\n".join(f"  {reason}" for reason in reasons)
        )
    dropped = {name: f"{name}-{there.data[name].key}" for name, domains in became.items() if not domains}
    interpolates = here.study.proxy_score != "merged"

    def make(folder: Path) -> None:
        entries: list[dict[str, Any]] = []
        rows: dict[str, dict[str, float]] = {}
        known: dict[str, Score] = {}

        def add(table: ScoreTable, model: str) -> None:
            rows[found.row(model)] = {score: table.rows[model][score] for score in scores if score in table.rows[model]}

        for r in used:
            table = ScoreTable.read(r.scores.folder / SCORES)
            known |= {score.name: score for score in table.scores}
            for m in read_json(r.proposal.folder / MIXTURES):
                shares = _shares(m["shares"], became, dropped, here)
                entries.append({"name": found.row(m["name"]), "weights": m["weights"], "shares": shares})
                if scores_proxies(there.study):
                    add(table, m["name"])
            if r.number == 1 and interpolates:
                for name in there.merged:
                    add(table, component_row(name))
        if not entries:
            raise IncompatibleInputs(f"search.earlier: {label} has scored no proxies of its own. Take it out.")
        write_json(folder / MIXTURES, entries)
        ScoreTable([known[name] for name in scores], rows).write(folder / SCORES)

    settings: dict[str, Any] = {
        "study": label,
        "rounds": [[r.proposal.key, r.scores.key] for r in used],
        "domains": list(here.data),
        "parts": became,
        "dropped": dropped,
        "scores": scores,
        "components": interpolates,
    }
    needs = {name: here.data[name] for domains in became.values() if len(domains) > 1 for name in domains}
    stage = Stage(f"earlier/{label}", here.run, settings, tuple(needs.values()), make)
    if not absent_ok and not stage.is_intact():
        _require(label, spec, [s for r in used for s in (r.proposal, r.scores)])
    same = [name for name, domains in became.items() if domains == [name] and name not in spec.split]
    num_proxies = sum(there.study.search.rounds[: len(used)])
    found = Earlier(label, stage, num_proxies, scores, left_out, same, spec.split, dropped, second_order(there.study))
    return found


def _what_became(label: str, spec: EarlierSpec, here: Foundation, there: Dag) -> dict[str, list[str]]:
    """What each of its domains is here: itself, if text and name are the same; what it was split into; or none."""
    for name in spec.split:
        if name not in there.data:
            raise ConfigError(f"search.earlier: split: {label} has no domain {name!r}{nearest(name, list(there.data))}")
    became = {}
    for name, stage in there.data.items():
        same = name in here.data and here.data[name].key == stage.key
        if same and name in spec.split:
            raise ConfigError(f"search.earlier: split: {name!r} is the same domain here as in {label}; take it out.")
        became[name] = [name] if same else spec.split.get(name, [])
    return became


def _require(label: str, spec: EarlierSpec, stages: Sequence[Stage]) -> None:
    for stage in stages:
        if not stage.done():
            name = stage.folder.name
            others = sorted(path.name for path in stage.folder.parent.glob(f"{name.removesuffix(stage.key)}*"))
            there_is = f" (there is {', '.join(others)}, of other text or settings)" if others else ""
            raise ConfigError(
                f"search.earlier: {label} is not done: {stage.folder} does not exist{there_is}. Its file and its text have to "
                f"be as they were run. If it was not run, `demix search {spec.study}` does it; of a study that was given up, "
                "`rounds` says how many of its rounds to use."
            )


def _shares(
    shares: Mapping[str, float], became: Mapping[str, Sequence[str]], dropped: Mapping[str, str], here: Foundation
) -> dict[str, float]:
    """Actual shares of the domains of this study, and after them of those that are no longer there."""
    found = dict.fromkeys([*here.data, *dropped.values()], 0.0)
    for name, share in shares.items():
        domains = became[name]
        if not domains:
            found[dropped[name]] = share
        elif len(domains) == 1:
            found[domains[0]] += share
        else:
            tokens = data_stages.tokens({domain: here.data[domain] for domain in domains}, "train")
            for domain in domains:
                found[domain] += share * tokens[domain] / sum(tokens.values())
    return found
