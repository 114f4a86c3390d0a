"""The search on CSV tables, joined by id and column name: what tools/search_mixture.py does, for those who have no study."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_demix.errors import ConfigError, IncompatibleInputs
from megatron_demix.mixture import TOLERANCE
from megatron_demix.search.consistency import rank_consistency
from megatron_demix.search.fits import fit_scores
from megatron_demix.search.objective import Objective, normalised, usable_objective
from megatron_demix.search.optimise import propose
from megatron_demix.search.outcome import outcome
from megatron_demix.search.reach import distances, far_off
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.surrogate import LITTLE_SKILL, Surrogate, is_constant
from megatron_demix.search.tables import MERGE_WEIGHTS, SHARES, Table, as_mixtures, no_number
from megatron_demix.study.choices import Aim

Notice = Callable[[str], None]


def fit_tables(
    mixtures: Table,
    scores: Table,
    *,
    kind: str,
    seed: int,
    notice: Notice,
    space: SearchSpace | None = None,
    spare: Collection[str] = (),
) -> dict[str, Surrogate]:
    """A surrogate of every score on the mixtures' rows; with a space, they are merge weights and are turned into its shares.

    A score that is the same for all mixtures is left out, and so is one of `spare` that some mixtures lack. notice is told so,
    where rounded mixtures were divided by their sum, and which family each score got.
    Raises MixtureError (a row is no mixture), IncompatibleInputs (ids or domains differ, missing scores, none to fit; shares
    where merge weights are expected, or the reverse).
    """
    mixtures.check_holds(SHARES if space is None else MERGE_WEIGHTS)
    if space is None:
        shares_MD = _mixtures(mixtures, notice)
    else:
        shares_MD = space.shares(_mixtures(mixtures.with_columns(space.domains, other="the domains file"), notice))
    known = set(mixtures.ids)
    if extra := [name for name in scores.ids if name not in known]:
        raise IncompatibleInputs(f"{scores.path}: id {extra[0]!r} has no mixture in {mixtures.path} ({len(extra)} such).")
    surrogates = {}
    for name, surrogate in fit_scores(shares_MD, _usable_scores(scores, mixtures, spare, notice), kind, seed=seed):
        surrogates[name], error = surrogate, surrogate.cross_validation
        notice(f"{name}: {surrogate.kind}, out of fold rmse {error['rmse']:.4g}, Spearman {error['spearman']:.3f}")
        if surrogate.skill < LITTLE_SKILL:
            notice(
                f"{name}: the surrogate is hardly better than the mean at what it has not seen. A mixture chosen by it, its "
                "gain and how often it wins may be noise: measure more mixtures, or more finely."
            )
    return surrogates


def _usable_scores(scores: Table, mixtures: Table, spare: Collection[str], notice: Notice) -> dict[str, np.ndarray]:
    """values_M of each score that there is something to learn from, in the order of the mixtures."""
    scores_MT = scores.select(mixtures.ids, scores.columns, other=mixtures.path)
    usable = {}
    for name, values_M in zip(scores.columns, scores_MT.T, strict=True):
        if (bad_M := ~np.isfinite(values_M)).any():
            seen = f"{scores.path}: {name} of {mixtures.ids[bad_M.argmax()]!r} is {no_number(values_M[bad_M][0])}"
            seen += f" ({bad_M.sum()} such)"
            if name not in spare:
                raise IncompatibleInputs(
                    f"{seen}. No number is put in its place: evaluate the proxy again, or leave it out of both tables."
                )
            notice(f"{seen}; nothing aims at it, so the score is left out.")
        elif is_constant(values_M):
            notice(f"{scores.path}: {name} is {values_M[0]:g} for every mixture: nothing to learn, so the score is left out.")
        else:
            usable[name] = values_M
    if not usable:
        raise IncompatibleInputs(
            f"{scores.path}: no score tells the mixtures apart. Use a finer one (a loss instead of an accuracy)."
        )
    return usable


def _mixtures(table: Table, notice: Notice) -> np.ndarray:
    """shares_MD of the table's mixtures; where rounded ones were divided by their sum, notice is told."""
    shares_MD, gap = as_mixtures(table)
    if gap > TOLERANCE:
        notice(
            f"{table.path.name}: mixtures miss a sum of 1 by up to {gap:.2g}, as rounded numbers do: each was divided "
            "by its sum."
        )
    return shares_MD


def predict_scores(mixtures: Table, scores: Table, wanted: Table, *, kind: str, seed: int, notice: Notice) -> Table:
    """Each score, and its <score>_std, predicted at the mixtures `wanted` from those measured. Raises as fit_tables does."""
    wanted.check_holds(SHARES)
    wanted_ND = _mixtures(wanted.with_columns(mixtures.columns, other=mixtures.path), notice)
    if clash := sorted(name for name in scores.columns if f"{name}_std" in scores.columns):
        raise IncompatibleInputs(
            f"{scores.path}: {clash[0] + '_std'!r} is a score, and the name of the predicted deviation of {clash[0]!r}. Rename "
            "or drop one of them."
        )
    columns: dict[str, np.ndarray] = {}
    surrogates = fit_tables(mixtures, scores, kind=kind, seed=seed, notice=notice)
    nearest_N, usual = distances(surrogates, wanted_ND)
    if num := sum(far_off(nearest, usual) for nearest in nearest_N.tolist()):
        farthest = int(nearest_N.argmax())
        notice(
            f"{num} of {len(wanted_ND)} mixtures to predict lie farther from all measured ones than these from one another "
            f"({usual:.3g} in total variation; {wanted.ids[farthest]}: {nearest_N[farthest]:.3g}): predictions there are "
            "extrapolated."
        )
    for name, surrogate in surrogates.items():
        columns[name], columns[f"{name}_std"] = surrogate.predict(wanted_ND)
    id_name = "id" if wanted.id_name == SHARES else wanted.id_name  # these are scores
    return Table(wanted.path, id_name, wanted.ids, tuple(columns), np.stack(list(columns.values()), axis=1))


def choose_from_tables(
    space: SearchSpace,
    mixtures: Table,
    scores: Table,
    objective: Mapping[str, float],
    *,
    aim: Aim,
    higher_is_better: Collection[str],
    kind: str,
    candidates: int,
    top: int,
    bootstraps: int,
    next_round: int,
    seed: int,
    notice: Notice,
) -> tuple[dict[str, Any], np.ndarray]:
    """mixture.json (search/outcome.py) for measured merge weights, and next_round x D merge weights to try next."""
    normalised(objective, scores.columns)  # a slip in a name is found before the fits
    spare = [name for name in scores.columns if not objective.get(name)]
    surrogates = fit_tables(mixtures, scores, kind=kind, seed=seed, notice=notice, space=space, spare=spare)
    left_out = [name for name in scores.columns if name not in surrogates]
    constant = {name: float(scores.column(name)[0]) for name in left_out if objective.get(name)}
    objective = usable_objective(
        {name: weight for name, weight in objective.items() if weight or name not in left_out}, constant
    )
    higher = set(higher_is_better) - set(left_out)
    goal = Objective(space, surrogates, objective, aim=aim, higher_is_better=higher, seed=seed)
    report = outcome(goal, candidates=candidates, top=top, bootstraps=bootstraps)
    nearest, usual = report["distance"]["nearest"], report["distance"]["usual"]
    if far_off(nearest, usual):
        notice(
            f"the best mixture is {nearest:.3g} (total variation) from the nearest measured one, farther than these are from "
            f"one another ({usual:.3g}): what is predicted there is extrapolated. Measure mixtures near it (--propose)."
        )
    further_MD = np.empty((0, len(space.domains)))
    if next_round:
        further_MD = propose(goal, num=next_round, candidates=candidates)
    return report, further_MD


def compare_tables(
    proxies: Table,
    references: Table,
    reseeded: Table | None,
    objective: Mapping[str, float] | None,
    higher_is_better: Collection[str],
    *,
    num_bootstraps: int,
    seed: int,
) -> dict[str, Any]:
    """rank_consistency of tables, joined by id and column name, with "num_proxies": proxies without a reference are left out.

    Raises IncompatibleInputs where a reference has no proxy, or no re-seeded reference, and where either side lacks a score.
    """
    if unknown := sorted(set(higher_is_better) - set(references.columns)):
        raise IncompatibleInputs(f"{references.path}: no score {unknown[0]!r}; the scores are {', '.join(references.columns)}.")
    sides = []
    for table in (references, proxies, reseeded):
        if table is not None:
            extra = sorted(set(table.ids) - set(references.ids))
            if extra and table is reseeded:
                raise IncompatibleInputs(
                    f"{table.path}: mixture {extra[0]!r} is not in {references.path} ({len(extra)} such). Missing scores block "
                    "the comparison: evaluate it, or remove it here."
                )
            values_MT = table.select(references.ids, references.columns, other=references.path)
            if len(bad := np.argwhere(~np.isfinite(values_MT))):
                m, t = bad[0]
                raise IncompatibleInputs(
                    f"{table.path}: {references.columns[t]} of {references.ids[m]!r} is {no_number(values_MT[m, t])} "
                    f"({len(bad)} such). Missing scores, and infinite ones, block the comparison: evaluate it, or remove the "
                    "mixture from the references (all of them)."
                )
            sides.append({name: values_MT[:, t] for t, name in enumerate(references.columns)})
    again = sides[2] if reseeded is not None else None
    report = rank_consistency(
        sides[1],
        sides[0],
        reseeded=again,
        objective=objective,
        higher_is_better=higher_is_better,
        num_bootstraps=num_bootstraps,
        seed=seed,
    )
    return {"num_proxies": len(proxies.ids)} | report


def parse_objective(texts: Sequence[str]) -> dict[str, float] | None:
    """["code=0.6", "math=0.4"] as weights by score; None if empty. Raises ConfigError."""
    weights = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name or not math.isfinite(weights[name]):
            raise ConfigError(f"objective {text!r} is not understood. Write SCORE=WEIGHT, for example code=0.6.")
    if len(weights) < len(texts):
        raise ConfigError(f"objective {' '.join(texts)}: a score has two weights. Give each one.")
    return weights or None
