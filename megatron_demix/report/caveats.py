"""What a report must say against itself: what was not measured, and what was measured and looks weak."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_demix.report.data import BlendRow, Fit, ReportData
from megatron_demix.report.maturity import maturity_warning
from megatron_demix.report.selection import last_fit, listed
from megatron_demix.report.verdict import Verdict

WEAK_RANK_CORRELATION = 0.7
"""A surrogate below this out of fold is pointed out: it orders mixtures poorly."""
_MOST_ALIKE = 6
"""Warnings of one kind, each a sentence; more become one."""
NO_WEIGHT = 0.005
"""A merge weight below this counts as none."""


def warnings(data: ReportData, verdict: Verdict) -> list[str]:
    """Weak spots of what was measured, each with what to do about it."""
    found = _of_rounds(data)
    found += _weak_surrogates(data, last_fit(data))
    if data.rounds:
        last = next((r for r in reversed(data.rounds) if r.fit or r.constant), data.rounds[-1])
        found += _constant({score: value for score, value in last.constant.items() if data.objective.get(score)})
    found += _of_tasks(data)
    found += data.few[:_MOST_ALIKE]
    if num := len(data.few[_MOST_ALIKE:]):
        found.append(f"So it is with {num} more splits of domains, which demix plan names.")
    if data.extrapolation_warning:
        found.append(data.extrapolation_warning)
    if maturity := maturity_warning(data):
        found.append(maturity)
    if data.choice and data.choice.distance:
        nearest, usual = data.choice.distance
        if nearest > usual:
            found.append(
                f"The found mixture is {nearest:.1%} of the data away from that of any proxy, and 9 in 10 proxies have another "
                f"within {usual:.1%}: what is predicted of it is extrapolated. Another round would measure there."
            )
    if floor := _at_the_floor(data):
        found.append(
            f"The found mixture has hardly any merge weight on {listed(floor)}: the shares it has of them come from the "
            "anchor that every component was trained on, and no proxy stands for less. The best mixture may lie beyond; a "
            "smaller component.anchor.share would let the search look there."
        )
    if verdict.comparisons and verdict.noise is None:
        found.append("Each final mixture was trained with one seed: no difference can be told from chance.")
    elif 0 < (few := min((g.num_seeds for g in verdict.groups), default=0)) <= 3:
        seeds = f"{few} seed{'s' * (few > 1)}"
        found.append(f"{seeds} a mixture give a rough estimate of the noise: the intervals are wide for that reason.")
    return found + [_inexact(mixture, rows) for mixture, rows in data.blends.items() if any(map(_is_off, rows.values()))]


def _of_rounds(data: ReportData) -> list[str]:
    found = []
    for number, r in enumerate(data.rounds, start=1):
        if not r.mixtures:
            found.append(f"Round {number} was left empty: after what came before it, too little was left to win (search.stop).")
        if (num := len({tuple(round(weight, 6) for weight in p.weights.values()) for p in r.mixtures})) < len(r.mixtures):
            found.append(
                f"Round {number}: {num} of {len(r.mixtures)} mixtures {'are' if num > 1 else 'is'} distinct: the bounds leave "
                "no others."
            )
        if r.scores and (lacking := len(r.mixtures) - len(data.measured(number - 1))):
            found.append(
                f"Round {number}: {lacking} of {len(r.mixtures)} proxies have no finite objective, and are not in the plots. "
                "Look at their scores below."
            )
    return found


def _of_tasks(data: ReportData) -> list[str]:
    found = []
    if same := data.seen_tasks:
        found.append(
            f"The final runs are compared on the very items of {', '.join(same)} that the mixture was chosen by, so the found "
            "mixture looks better there than it is (evaluate.tasks, final_split)."
        )
    found += [
        f"Of the {task.answers} answers to {name} that models gave in the search, {task.endless} did not end by themselves and "
        f"{task.stopped} had to be stopped when they were run or compared; the latter count as wrong."
        for name, task in data.tasks.items()
        if task.endless or task.stopped
    ]
    found += [
        f"{task.cut} texts of {name} are longer than the models read: their beginning, worked examples first, was left out. "
        "Fewer num_shots, or a smaller max_new_tokens, would leave them whole."
        for name, task in data.tasks.items()
        if task.cut
    ]
    return found


def _weak_surrogates(data: ReportData, fits: Mapping[str, Fit]) -> list[str]:
    """Of scores that count."""
    used = {score: fits[score] for score, weight in data.objective.items() if weight and score in fits}
    hardly = [score for score, fit in used.items() if fit.little_skill]
    poorly = [score for score, fit in used.items() if not fit.little_skill and not fit.spearman >= WEAK_RANK_CORRELATION]
    more = "Use more proxies, or more tokens in their evaluation."
    noise = f"what was chosen by it, and its gain, may be noise. {more}"
    guessing = f"the search was close to guessing there. {more}"
    if len(hardly) > _MOST_ALIKE:
        found = [
            f"The surrogates of {len(hardly)} scores of the objective are hardly better than the mean at proxies they have not "
            f"seen ({listed(hardly)}): {noise}"
        ]
    else:
        found = [
            f"The surrogate of {score} is hardly better than the mean at proxies it has not seen: {noise}" for score in hardly
        ]
    if len(poorly) > _MOST_ALIKE:
        poorly.sort(key=lambda score: used[score].spearman if math.isfinite(used[score].spearman) else -1.0)
        found.append(
            f"The surrogates of {len(poorly)} scores of the objective order proxies they have not seen with rank correlations "
            f"below {WEAK_RANK_CORRELATION} ({listed([f'{s} {used[s].correlation}' for s in poorly])}): {guessing}"
        )
    else:
        found += [
            f"The surrogate of {score} orders proxies it has not seen with a rank correlation of {used[score].correlation}: "
            f"{guessing}"
            for score in poorly
        ]
    return found


def _constant(values: Mapping[str, float]) -> list[str]:
    """On scores that were the same for every proxy."""
    finer = "A finer score of the same task (bits_per_byte) tells proxies apart earlier."
    if len(values) > _MOST_ALIKE:
        each = listed([f"{score} {value:g}" for score, value in values.items()])
        return [f"{len(values)} scores were the same for every proxy ({each}): the search could not use them. {finer}"]
    return [f"{score} was {value:g} for every proxy: the search could not use it. {finer}" for score, value in values.items()]


def _is_off(row: BlendRow) -> bool:
    return abs(row.realised_tokens - row.requested_tokens) > 0.02 * row.requested_tokens


def _inexact(mixture: str, rows: Mapping[str, BlendRow]) -> str:
    asked, made = (
        sum(tokens) for tokens in zip(*((r.requested_tokens, r.realised_tokens) for r in rows.values()), strict=True)
    )
    off = listed(
        [
            f"{row.realised_tokens / max(made, 1):.1%} {name} where {row.requested_tokens / max(asked, 1):.1%} were asked for"
            for name, row in rows.items()
            if _is_off(row)
        ]
    )
    return (
        f"The final data of {mixture} holds {off}: it consists of whole documents in an order drawn by chance, and each domain "
        "is off by up to one of its own. A larger final.tokens, or shorter documents, come nearer."
    )


def _at_the_floor(data: ReportData) -> list[str]:
    """Domains the search would have given less of, had the anchor allowed it."""
    if not data.choice:
        return []
    shares = data.choice.shares
    return [name for name, weight in data.choice.weights.items() if weight < NO_WEIGHT and shares.get(name, 0.0) > NO_WEIGHT]


def not_measured(data: ReportData, verdict: Verdict) -> list[str]:
    """What this study does not show."""
    items = []
    if not data.choice:
        items.append("The mixture: the search is not finished.")
    if not verdict.groups:
        items.append("Whether the found mixture is better than any other: no final run is finished.")
    else:
        items.append(
            f"Noise other than the final runs' seeds: base and {'components' if data.proxies == 'merged' else 'proxies'} were "
            "trained once, and the validation and test documents were drawn once."
        )
    items.append(
        f"Whether the {data.kind_of_proxies} proxies rank mixtures as models trained on them for the final budget would: no "
        "such reference models were trained."
    )
    if data.mixed:
        items.append(
            f"How much of the correction by {', '.join(data.mixed)} is noise: each mixed component was trained with one seed."
        )
    if data.proxies == "merged":
        predicts = "merging predicts more than interpolating the components' own scores, or more than"
        if data.kind_of_proxies != "merged":
            predicts = "the components' own scores predict more than merged proxies, or than"
        items.append(f"Whether {predicts} short trained proxies at the same cost.")
    if data.tasks:
        items.append(f"Other tasks than {', '.join(data.tasks)}.")
    else:
        items.append("Anything but loss: no downstream task was run.")
    items.append("Other model sizes, token budgets and learning rates: the result is for the settings below.")
    return items
