"""From the artifacts of a run, as many as are there, to its report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_demix.artifact import read_json
from megatron_demix.evaluate.scores import ScoreTable, weighted_objective
from megatron_demix.pipeline import data_stages
from megatron_demix.pipeline.final_stages import FOUND
from megatron_demix.pipeline.search_stages import CHOICE, FIT, MIXTURES
from megatron_demix.pipeline.stage import Stage

if TYPE_CHECKING:
    from megatron_demix.pipeline.dag import Dag
    from megatron_demix.report.data import BlendRow, Choice, Domain, FinalRun, ReportData, Round


def write_report(dag: Dag) -> Path:
    """Write <run>/report/index.html, replacing an earlier one: it is derived, and may be made again at any time."""
    from megatron_demix.report.build import build_report

    page = dag.run / "report" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    build_report(collect(dag), page)
    return page


def verdict(dag: Dag) -> str:
    """One honest sentence about the final table."""
    from megatron_demix.report.verdict import judge

    return judge(collect(dag)).sentence


def collect(dag: Dag) -> ReportData:
    """What is done so far, as plain data."""
    from megatron_demix.report.data import ReportData

    choice = _choice(dag)
    blend = _blend(dag)
    return ReportData(
        study=dag.study.name,
        settings=dag.study.model_dump(mode="json", exclude_defaults=True),
        objective=dag.study.search.objective,
        domains=_domains(dag, {name: row.epochs for name, row in blend.items()}),
        losses=dict(_losses(dag)),
        rounds=_rounds(dag),
        choice=choice,
        final=_final(dag),
        untrained=_untrained(dag),
        blend=blend,
        timings_s=_timings(dag),
    )


def _domains(dag: Dag, epochs: dict[str, float]) -> list[Domain]:
    from megatron_demix.report.data import Domain

    done = {name: stage for name, stage in dag.data.items() if stage.done()}
    total = sum(data_stages.tokens(done, "train").values())
    rows = []
    for name, stage in done.items():
        train = read_json(stage.folder / data_stages.STATS)["splits"]["train"]
        share = train["tokens"] / total
        rows.append(Domain(name, train["documents"], train["tokens"], train.get("bytes", 0), share, epochs.get(name)))
    return rows


def _losses(dag: Dag) -> Iterator[tuple[str, dict[str, list[float]]]]:
    for stage in (dag.base, *dag.components.values(), *dag.finals.values()):
        path = stage.folder / "losses.jsonl"
        if stage.done() and path.is_file():
            entries = [e for e in map(json.loads, path.read_text().splitlines()) if "lm loss" in e]
            yield stage.name, {column: [e[column] for e in entries] for column in ("iteration", "lm loss")}


def _rounds(dag: Dag) -> list[Round]:
    from megatron_demix.report.data import Fit, Proxy, Round

    rounds = []
    for r in dag.rounds:
        if not r.proposal.done():
            break
        mixtures = [Proxy(m["name"], m["weights"], m["shares"]) for m in read_json(r.proposal.folder / MIXTURES)]
        scores = ScoreTable.read(r.scores.folder / "scores.json").rows if r.scores.done() else {}
        fits: dict[str, Any] = read_json(r.fit.folder / FIT) if r.fit.done() else {}
        fit = {name: Fit(f["kind"], f["spearman"], f["rmse"], f["measured"], f["predicted"]) for name, f in fits.items()}
        rounds.append(Round(mixtures, scores, fit))
    return rounds


def _choice(dag: Dag) -> Choice | None:
    from megatron_demix.report.data import Choice

    if not dag.choice.done():
        return None
    found = read_json(dag.choice.folder / CHOICE)
    predicted = {name: (mean, std) for name, (mean, std) in found["predicted"].items()}
    return Choice(found["weights"], found["merge_weights"], predicted, tuple(found["objective"]))


def _final(dag: Dag) -> list[FinalRun]:
    from megatron_demix.report.data import FinalRun

    if not dag.final_scores.done():
        return []
    rows = ScoreTable.read(dag.final_scores.folder / "scores.json").rows
    result = []
    for name in dag.finals:
        mixture, _, seed = name.rpartition("-seed")
        result.append(FinalRun(mixture, int(seed), rows[name], weighted_objective(rows[name], dag.study.search.objective)))
    return result


def _untrained(dag: Dag) -> dict[str, dict[str, float]]:
    if not dag.final_scores.done():
        return {}
    rows = ScoreTable.read(dag.final_scores.folder / "scores.json").rows
    return {"base": rows["base"], "found, merged only": rows["proxy"]}


def _blend(dag: Dag) -> dict[str, BlendRow]:
    from megatron_demix.report.data import BlendRow

    stage = dag.blends[FOUND]
    if not stage.done():
        return {}
    domains = read_json(next(stage.folder.glob("*.blend.json")))["domains"]
    return {
        name: BlendRow(d["requested_tokens"], d["planned_tokens"], d["tokens"], d["epochs"], d["documents"])
        for name, d in domains.items()
    }


def _timings(dag: Dag) -> dict[str, float]:
    """Wall-clock seconds of each stage of this study, from the last time it was made."""
    stages: dict[str, Stage] = {s.key: s for s in dag.all}
    log = dag.run / "metrics.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {stages[e["key"]].name: e["wall_s"] for e in entries if e["event"] == "stage" and e["key"] in stages}
