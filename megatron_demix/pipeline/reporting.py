"""From the artifacts of a run, as many as are there, to its report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_demix.artifact import read_json
from megatron_demix.evaluate.job import NOTES, SCORES
from megatron_demix.evaluate.scores import ScoreTable
from megatron_demix.pipeline import data_stages
from megatron_demix.pipeline.cost import by_kind, costs
from megatron_demix.pipeline.final_stages import FOUND
from megatron_demix.pipeline.maturity_stages import BASE
from megatron_demix.pipeline.preflight import few
from megatron_demix.pipeline.scoring import MERGED_CENTROID, scored_losses
from megatron_demix.pipeline.search_stages import CHOICE, FIT, MIXTURES
from megatron_demix.pipeline.stage import Stage
from megatron_demix.pipeline.train_stages import horizon_line
from megatron_demix.report.data import (
    BlendRow,
    Choice,
    Cost,
    Domain,
    FinalRun,
    Fit,
    FrontPoint,
    Maturity,
    Optimum,
    Proxy,
    ReportData,
    Round,
    Task,
)

if TYPE_CHECKING:
    from megatron_demix.pipeline.dag import Dag

_FINISHED = "finished-"


class Report(NamedTuple):
    page: Path
    sentence: str
    """One honest sentence about the final table."""


def write_report(dag: Dag) -> Report:
    """Write <run>/report/index.html, replacing an earlier one: it is derived, and may be made again at any time. One with final
    runs is kept beside it, since its data may not be there again. Each has the table of all its proxies."""
    from megatron_demix.report.build import build_report
    from megatron_demix.report.verdict import judge

    page = dag.run / "report" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    data = collect(dag)
    build_report(data, page)
    if data.final:
        name = f"{_FINISHED}{dag.final_scores.key}"
        build_report(data, page.with_name(f"{name}.html"), f"{name}-proxies.csv")
    return Report(page, judge(data).sentence)


def finished_reports(run: Path) -> list[Path]:
    """Of all data and settings whose final runs were scored in this run's folder."""
    return sorted((run / "report").glob(f"{_FINISHED}*.html"))


def collect(dag: Dag) -> ReportData:
    """What is done so far, as plain data."""
    choice = _choice(dag)
    blends = _blends(dag)
    line = horizon_line(dag.study)
    return ReportData(
        study=dag.study.name,
        settings=dag.study.model_dump(mode="json", exclude_defaults=True),
        objective=dag.study.search.objective,
        aim=dag.study.search.aim,
        higher_is_better=_higher_is_better(dag),
        tasks=_tasks(dag),
        domains=_domains(dag, {name: row.epochs for name, row in blends.get(FOUND, {}).items()}),
        few=_few(dag),
        losses=dict(_losses(dag)),
        proxies=dag.study.search.proxies,
        proxy_score=dag.study.proxy_score,
        merged_parts=_merged_parts(dag),
        extrapolated=str(line) if line else "",
        extrapolation_warning=line.warning if line else None,
        rounds=_rounds(dag),
        mixed=list(dag.mixed),
        earlier=_earlier(dag),
        maturity=_maturity(dag),
        choice=choice,
        final=_final(dag),
        untrained=_untrained(dag),
        blends=blends,
        costs=_costs(dag),
        timings_s=_timings(dag),
    )


def _costs(dag: Dag) -> list[Cost]:
    spent = costs(dag, [stage for stage in dag.all if stage.is_intact()])
    return [Cost(c.kind, c.models_in_words, c.tokens, c.flop) for c in by_kind(spent.values())]


def _tasks(dag: Dag) -> dict[str, Task]:
    if not dag.study.evaluate.tasks:
        return {}
    from megatron_demix.evaluate.tasks.task import share_items

    stages = dict.fromkeys(r.scores for r in dag.rounds)
    notes = [row for stage in stages if (file := stage.folder / NOTES).is_file() for row in read_json(file).values()]
    tasks = {}
    for task, final in zip(dag.tasks.search.specs, dag.tasks.final.specs, strict=True):
        generated = [row[task.name] for row in notes if "endless" in row[task.name]]
        answers, endless, stopped = (sum(row[key] for row in generated) for key in ("items", "endless", "stopped"))
        cut = max((row[task.name]["cut"] for row in notes), default=0)
        tasks[task.name] = Task(not share_items(task, final), answers, endless, stopped, cut)
    return tasks


def _merged_parts(dag: Dag) -> dict[str, float]:
    fits = [r.fit for r in dag.rounds if r.fit.is_intact()]
    found = read_json(fits[-1].folder / FIT).get("through_centroid", {}) if fits else {}
    return {name: facts["merged_part"] for name, facts in found.items()}


def _domains(dag: Dag, epochs: dict[str, float]) -> list[Domain]:
    if not all(stage.is_intact() for stage in dag.data.values()):
        return []  # shares of some would be no shares
    total = sum(data_stages.tokens(dag.data, "train").values())
    rows = []
    for name, stage in dag.data.items():
        splits = data_stages.splits(stage)
        train, share = splits["train"], splits["train"]["tokens"] / total
        held_out = {split: (splits[split]["tokens"], splits[split]["documents"]) for split in ("valid", "test")}
        rows.append(Domain(name, train["documents"], train["tokens"], train.get("bytes"), share, epochs.get(name), held_out))
    return rows


def _few(dag: Dag) -> list[str]:
    """Of domains whose loss is measured."""
    said = []
    for name in scored_losses(dag):
        if dag.data[name].is_intact():
            splits = data_stages.splits(dag.data[name])
            said += [few(dag.study, name, split, **splits[split]) for split in ("valid", "test")]
    return [sentence[0].upper() + sentence[1:] for sentence in said if sentence]


def _losses(dag: Dag) -> Iterator[tuple[str, dict[str, list[float]]]]:
    for stage in dag.all:
        if stage.kind not in ("base", "components", "final"):
            continue
        path = stage.folder / "losses.jsonl"
        if stage.is_intact() and path.is_file():
            entries = [e for e in map(json.loads, path.read_text().splitlines()) if "lm loss" in e]
            yield stage.name, {column: [e[column] for e in entries] for column in ("iteration", "lm loss")}


def _rounds(dag: Dag) -> list[Round]:
    from megatron_demix.search.surrogate import LITTLE_SKILL, Z90

    rounds = []
    facts_of = {r.number: read_json(r.fit.folder / FIT) for r in dag.rounds if r.fit.is_intact()}
    counted = _counted(facts_of[max(facts_of)]) if facts_of else {}
    for r in dag.rounds:
        if not r.proposal.is_intact():
            break
        mixtures = [Proxy(m["name"], m["weights"], m["shares"]) for m in read_json(r.proposal.folder / MIXTURES)]
        table = ScoreTable.read(r.scores.folder / SCORES) if r.scores.is_intact() else ScoreTable([])
        # In the order of the table; before the first fit, as the merged models have scored.
        rows = {m.name: counted.get(m.name, table.rows.get(m.name, {})) for m in mixtures}
        order = [score.name for score in table.scores]
        scores = {model: {name: row[name] for name in order if name in row} for model, row in rows.items() if row}
        facts: dict[str, Any] = facts_of.get(r.number, {})
        fit = {
            name: Fit(
                f["kind"],
                f["spearman"],
                f["rmse"],
                f["measured"],
                f["predicted"],
                [Z90 * std for std in f["std"]],
                f.get("skill", 1) < LITTLE_SKILL,
            )
            for name, f in facts.get("surrogates", {}).items()
        }
        rounds.append(Round(mixtures, scores, fit, facts.get("objective", {}), facts.get("constant", {})))
    return rounds


def _counted(fit: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By proxy, what the search took for its scores, whether merged, interpolated or otherwise."""
    found: dict[str, dict[str, float]] = {}
    for name, facts in fit["surrogates"].items():
        for model, value in zip(facts["models"], facts["measured"], strict=True):
            found.setdefault(model, {})[name] = value
    return {model: row | fit.get("constant", {}) for model, row in found.items()}


def _earlier(dag: Dag) -> list[str]:
    """As the newest fit has used them, if there is one."""
    fits = [read_json(r.fit.folder / FIT)["earlier"] for r in dag.rounds if dag.earlier and r.fit.is_intact()]
    return [e.said(f"{fits[-1][e.label]['proxies'] if fits else e.num_proxies} proxies") for e in dag.earlier]


def _maturity(dag: Dag) -> Maturity | None:
    if dag.maturity is None or not dag.maturity.scores.is_intact():
        return None
    rows = ScoreTable.read(dag.maturity.scores.folder / SCORES).rows
    trained = [rows[name] for name in dag.maturity.trained]
    return Maturity(rows[MERGED_CENTROID], trained, rows[BASE], dag.study.mixed_centroid is not None)


def _higher_is_better(dag: Dag) -> frozenset[str]:
    stages = [*(r.scores for r in dag.rounds), *([dag.maturity.scores] if dag.maturity else [])]
    tables = [ScoreTable.read(stage.folder / SCORES) for stage in dict.fromkeys(stages) if stage.is_intact()]
    return frozenset(score.name for table in tables for score in table.scores if score.direction == "higher")


def _choice(dag: Dag) -> Choice | None:
    from megatron_demix.search.outcome import natural_in_words

    if not dag.choice.is_intact():
        return None
    found = read_json(dag.choice.folder / CHOICE)
    optimum = None
    if spread := found.get("optimum"):
        samples = dict(zip(spread["shares"], zip(*spread["samples"], strict=True), strict=True))
        optimum = Optimum(samples, spread["expected_regret"], tuple(spread["judged_gain"]), spread["judged_probability"])
    return Choice(
        shares=found["weights"],
        weights=found["merge_weights"],
        predicted={name: (mean, std) for name, (mean, std) in found["predicted"].items()},
        objective=tuple(found["objective"]),
        natural={name: (mean, std) for name, (mean, std) in found["natural"].items()},
        expected_gain=tuple(found["expected_gain"]),
        compared=natural_in_words(found["natural_distance"]),
        optimum=optimum,
        pareto=[FrontPoint(point["weights"], point["predicted"]) for point in found.get("pareto", ())],
        binding=[_sentence(bound) for bound in found["binding"]],
        # A run that ended before this was measured has none.
        distance=(found["distance"]["nearest"], found["distance"]["usual"]) if "distance" in found else None,
    )


def _sentence(bound: dict[str, Any]) -> str:
    """A bound of mixture.json in words, with the setting to change."""
    of, side, limit = bound["of"], bound["side"], bound["limit"]
    if bound["constraint"] == "max_kl":
        return f"max_kl: the shares are as far from the natural ones as {limit:g} nats allow."
    if bound["constraint"] == "anchor":
        more = {"at most": "more", "at least": "less"}[side]
        return f"component.anchor: no merge of these components has {more} than {limit:.1%} of {of}."
    name = f"group {of}" if bound["constraint"] == "group" else f"{bound['constraint']} of {of}"
    return f"{name}: {side} {limit:.1%} of the data."


def _final(dag: Dag) -> list[FinalRun]:
    if not dag.final_scores.is_intact():
        return []
    rows = ScoreTable.read(dag.final_scores.folder / SCORES).rows
    runs = ((*name.rpartition("-seed")[::2], rows[name]) for name in dag.finals)
    return [FinalRun(mixture, int(seed), scores) for mixture, seed, scores in runs]


def _untrained(dag: Dag) -> dict[str, dict[str, float]]:
    if not dag.final_scores.is_intact():
        return {}
    rows = ScoreTable.read(dag.final_scores.folder / SCORES).rows
    named = {"base": "base", "found, merged only": "proxy"}
    return {label: rows[name] for label, name in named.items() if name in rows}


def _blends(dag: Dag) -> dict[str, dict[str, BlendRow]]:
    found = {}
    for mixture, stage in dag.blends.items():
        if stage.is_intact():
            domains = read_json(next(stage.folder.glob("*.blend.json")))["domains"]
            found[mixture] = {
                name: BlendRow(d["requested_tokens"], d["planned_tokens"], d["tokens"], d["epochs"], d["documents"])
                for name, d in domains.items()
            }
    return found


def _timings(dag: Dag) -> dict[str, float]:
    """Wall-clock seconds of each stage of this study, from the last time it was made."""
    stages: dict[str, Stage] = {s.key: s for s in dag.all}
    log = dag.run / "metrics.jsonl"
    seconds = {}
    for line in log.read_text().splitlines() if log.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut short by a full disk, or two machines wrote at once
        if isinstance(entry, dict) and entry.get("event") == "stage" and entry.get("key") in stages:
            seconds[stages[entry["key"]].name] = entry["wall_s"]
    return seconds
