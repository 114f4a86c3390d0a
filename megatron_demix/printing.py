"""What commands print on standard output: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_demix.terminal import new_table, on_terminal, shown

if TYPE_CHECKING:
    from megatron_demix.launch.doctor import Finding
    from megatron_demix.pipeline.cost import Cost
    from megatron_demix.pipeline.dag import Dag
    from megatron_demix.pipeline.stage import Stage

_FINDING_COLOURS = {"works": "green", "installed": "green", "absent": "dim", "misfit": "red", "broken": "red"}


def show_plan(dag: Dag, stages: Sequence[Stage], *, scripts: bool, as_json: bool, foreseen: Sequence[Stage] = ()) -> None:
    """scripts: those of stages that are commands of their own, too. foreseen: others that have to be possible. Raises where the
    data cannot fill one, when all has been shown."""
    from megatron_demix.launch.status import COLOURS, counts
    from megatron_demix.pipeline import preflight
    from megatron_demix.pipeline.cost import by_kind, costs

    states, each = [stage.state() for stage in stages], costs(dag, stages)
    warn_of_damage(stages)
    if as_json:
        rows = [
            {
                "stage": stage.name,
                "state": state,
                "ranks": stage.ranks,
                "key": stage.key,
                "path": str(stage.folder),
                **({"cost": asdict(each[stage])} if stage in each else {}),
            }
            for stage, state in zip(stages, states, strict=True)
        ]
        print(json.dumps(rows, indent=1))
        preflight.check([*stages, *foreseen])
        return
    from rich.markup import escape

    table = new_table("stage", "state", "ranks", "artifact", right=("ranks",))
    for stage, state in zip(stages, states, strict=True):
        table.add_row(stage.name, f"[{COLOURS[state]}]{state}[/]", str(stage.ranks or "-"), escape(shown(stage.folder)))
    on_terminal().print(table, counts(states))
    to_do = [stage for stage, state in zip(stages, states, strict=True) if state != "done"]
    _show_costs(by_kind(each.values()), [each[stage] for stage in to_do if stage in each])
    for line in [*used_of_earlier(dag, stages), *_extrapolated(dag)]:
        print(line)
    if scripts:
        for stage in stages:
            if stage.script and not stage.is_intact():
                print(f"\n# ---- {stage.job.with_suffix('.sh')}\n{stage.script()}", end="")
    preflight.check([*stages, *foreseen])


def used_of_earlier(dag: Dag, stages: Sequence[Stage]) -> list[str]:
    """What these stages take over from other studies, and what not, and why."""
    return ["used of the earlier study " + e.said(f"at most {e.num_proxies} proxies") for e in dag.earlier if e.stage in stages]


def _show_costs(of_all: Sequence[Cost], to_do: Sequence[Cost]) -> None:
    from megatron_demix.pipeline.cost import UTILISATION
    from megatron_demix.units import format_bytes, format_count

    if not of_all:
        return
    columns = ("models", "tokens", "FLOP", "checkpoints")
    table = new_table("cost", *columns, right=columns)
    for cost in of_all:
        disk = format_bytes(cost.checkpoint_bytes) if cost.checkpoint_bytes else "-"
        table.add_row(cost.kind, cost.models_in_words, format_count(cost.tokens), f"{cost.flop:.2g}", disk)
    print()
    on_terminal().print(table)
    if flop := sum(cost.flop for cost in to_do):
        hours = sum(cost.gpu_hours for cost in to_do)
        said = f", {format_count(hours)} hours of an H100 at {UTILISATION:.0%} of its peak" if hours >= 1 else ""
        if left := sum(cost.checkpoint_bytes for cost in to_do):
            said += f", and {format_bytes(left)} of checkpoints"
        print(f"to do: {flop:.2g} FLOP{said}")


def _extrapolated(dag: Dag) -> list[str]:
    """How scores are continued to the final run's length, and what that does to their noise."""
    from megatron_demix.pipeline.train_stages import horizon_line

    line = horizon_line(dag.study)
    if line is None:
        return []
    return [f"search.extrapolate takes {line}", *([f"warning: {line.warning}"] if line.warning else [])]


def show_places(stages: Sequence[Stage], milestone: str, *, as_json: bool) -> None:
    """Where the stages lie that a command asks for; all that it needs in the JSON."""
    from megatron_demix.pipeline.dag import MILESTONES

    if as_json:
        print(json.dumps({stage.name: str(result(stage)) for stage in stages}, indent=1))
        return
    for stage in stages:
        if stage.kind in MILESTONES[milestone]:
            print(f"{stage.name}: {shown(result(stage))}", file=sys.stderr)


def result(stage: Stage) -> Path:
    """What others take of a stage: its folder, or the checkpoint in it."""
    from megatron_demix.pipeline.final_stages import PROXIES, found_proxy

    return found_proxy(stage) if stage.name == PROXIES else stage.folder


def show_choice(dag: Dag, *, as_json: bool) -> None:
    """The mixture that was found."""
    from megatron_demix.artifact import read_json
    from megatron_demix.pipeline.search_stages import CHOICE, FIT
    from megatron_demix.search.outcome import natural_in_words

    path = dag.choice.folder / CHOICE
    if as_json:
        print(path.read_text(), end="")
        return
    found = read_json(path)
    merged = dag.study.search.proxies == "merged"
    table = new_table("domain", "share", *(["merge weight"] if merged else []))
    for name, share in found["weights"].items():
        table.add_row(name, f"{share:.1%}", *([f"{found['merge_weights'][name]:.1%}"] if merged else []))
    judged = found["optimum"]["judged_gain"] if "optimum" in found else None
    mean, std = judged or found["expected_gain"]
    on_terminal().print(table)
    compared = natural_in_words(found["natural_distance"])
    said = "expected" if judged else "predicted"
    print(f"{said} to be {mean:.2g} ± {std:.1g} better than {compared}, in the objective's unit")
    constant = read_json(path.with_name(FIT)).get("constant", {})
    if left_out := [name for name, weight in dag.study.search.objective.items() if weight and name in constant]:
        print(f"left out of the objective, being the same for every proxy: {', '.join(left_out)}")
    print(shown(path))


def show_scores(scores: Stage, *, as_json: bool) -> None:
    """Of checkpoints that were given."""
    from megatron_demix.evaluate.job import SCORES
    from megatron_demix.pipeline.given_scores import table

    if as_json:
        print((scores.folder / SCORES).read_text(), end="")
        return
    titles, rows = table(scores)
    printed = new_table(*titles)
    for row in rows:
        printed.add_row(*row)
    on_terminal().print(printed)


def warn_of_damage(stages: Sequence[Stage]) -> None:
    for damage in filter(None, (stage.damage() for stage in stages)):
        print(f"warning: {damage}", file=sys.stderr)


def show_findings(findings: Sequence[Finding], *, as_json: bool) -> None:
    """Of `demix doctor`."""
    from rich.markup import escape

    if as_json:
        print(json.dumps([vars(f) for f in findings], indent=1))
        return
    table = new_table("what", "state", "found", "used for", "to do", folding=("found", "used for", "to do"))
    for f in findings:
        colour = "red" if f.is_problem else _FINDING_COLOURS[f.state]
        table.add_row(f.name, f"[{colour}]{f.state}[/]", escape(f.found), escape(f.purpose), escape(f.advice))
    on_terminal().print(table)
    problems = [f.name for f in findings if f.is_problem]
    print(f"to repair: {', '.join(problems)}" if problems else "everything that is needed works")
