"""An invented study of any size: every number is drawn, and nothing is trained."""

import random

from megatron_demix.report.data import (
    BlendRow,
    Choice,
    Domain,
    FinalRun,
    Fit,
    FrontPoint,
    Maturity,
    Optimum,
    Proxy,
    ReportData,
    Round,
)

_KINDS = ("gaussian_process", "quadratic", "ridge", "log_linear")


def invent(num_domains: int, num_scores: int, num_proxies: int, *, num_rounds: int = 3, num_steps: int = 120) -> ReportData:
    """Scores: every domain's loss as long as they last, then tasks'. Shares are skewed, as those of real corpora are. All
    losses count, a task in three does."""
    rng = random.Random(0)
    domains = [f"{('wiki', 'web', 'code', 'papers', 'forum')[i % 5]}-{_NOUNS[i % len(_NOUNS)]}-{i}" for i in range(num_domains)]
    tasks = [f"{_NOUNS[i % len(_NOUNS)]}_comprehension_{i}/bits_per_byte" for i in range(max(0, num_scores - num_domains))]
    scores = domains[:num_scores] + tasks
    objective = {s: 1.0 if i % 3 == 0 or s in domains else 0.0 for i, s in enumerate(scores)}
    skew = [1 / (1 + i) ** 0.8 for i in range(num_domains)]
    rng.shuffle(skew)
    natural = _normal(dict(zip(domains, skew, strict=True)))
    effect = {s: {d: rng.gauss(0, 0.5) - (s == d) for d in domains} for s in scores}
    noise = {s: 10 ** rng.uniform(-3.5, -1) for s in scores}

    def measured(shares: dict[str, float], s: str) -> float:
        return 2.5 + sum(effect[s][d] * share for d, share in shares.items())

    def near(shares: dict[str, float], width: float) -> dict[str, float]:
        return _normal({d: share * rng.lognormvariate(0, width) for d, share in shares.items()})

    rounds, seen, center = [], [], natural
    for number in range(1, num_rounds + 1):
        mixtures = []
        for i in range(num_proxies // num_rounds + (number <= num_proxies % num_rounds)):
            weights = near(center, 1.0 / number)
            mixtures.append(
                Proxy(f"r{number}_{i:03d}", weights, _normal({d: 0.5 / num_domains + w for d, w in weights.items()}))
            )
        table = {p.name: {s: measured(p.shares, s) + rng.gauss(0, noise[s]) for s in scores} for p in mixtures}
        seen += [(p, table[p.name]) for p in mixtures]
        fits = {
            s: Fit(
                _KINDS[i % 4],
                1 - 5 * noise[s],
                1.5 * noise[s],
                [row[s] for _, row in seen],
                [row[s] + rng.gauss(0, noise[s]) for _, row in seen],
                [noise[s]] * len(seen),
            )
            for i, s in enumerate(scores)
        }
        rounds.append(Round(mixtures, table, fits))
        center = min(seen, key=lambda pair: sum(objective[s] * pair[1][s] for s in scores))[0].shares
    found = center
    predicted = {s: (measured(found, s), noise[s]) for s in scores}
    samples = [near(found, 0.1) for _ in range(40)]
    heaviest = sorted(scores, key=lambda s: -objective[s])[:6]
    uniform = dict.fromkeys(domains, 1 / num_domains)
    mixtures = {"found": found, "natural": natural, "uniform": uniform}
    curves = ["base", *(f"components/{d}" for d in domains), *(f"final/{m}-seed{n}" for m in mixtures for n in (1, 2))]
    steps = range(1, num_steps + 1)
    return ReportData(
        study="invented",
        settings={"name": "invented", "domains": [{"name": d, "paths": f"/data/{d}"} for d in domains]},
        objective=objective,
        domains=[
            Domain(
                d, int(1e6 * s) + 9, int(1e10 * s) + 9, int(4e10 * s) + 9, s, 0.8, {"valid": (90_000, 80), "test": (90_000, 80)}
            )
            for d, s in natural.items()
        ],
        losses={c: {"iteration": list(steps), "lm loss": [7 / i + 2 + rng.gauss(0, 0.05) for i in steps]} for c in curves},
        rounds=rounds,
        maturity=Maturity(
            dict.fromkeys(scores, 2.5), [dict.fromkeys(scores, 2.5 + x) for x in (0, 0.01)], dict.fromkeys(scores, 3.0)
        ),
        choice=Choice(
            found,
            found,
            predicted,
            (sum(objective[s] * predicted[s][0] for s in scores) / sum(objective.values()), 0.001),
            natural={s: (measured(natural, s), noise[s]) for s in scores},
            expected_gain=(0.05, 0.01),
            optimum=Optimum({d: [m[d] for m in samples] for d in domains}, 0.0004, (0.05, 0.01), 1.0),
            pareto=[FrontPoint(m, {s: measured(m, s) for s in heaviest}) for m in (near(found, 0.2) for _ in range(30))],
            binding=[f"max_epochs of {domains[0]}: at most 60.0 % of the data."],
        ),
        final=[
            FinalRun(m, seed, {s: measured(shares, s) + rng.gauss(0, 0.002) for s in scores})
            for m, shares in mixtures.items()
            for seed in (1, 2)
        ],
        untrained={"base": dict.fromkeys(scores, 3.0)},
        blends={
            m: {d: BlendRow(int(1e9 * x), int(1e9 * x), int(1e9 * x), 0.8, 99) for d, x in row.items()}
            for m, row in mixtures.items()
        },
        timings_s=dict.fromkeys(curves, 60.0),
    )


_NOUNS = (
    "english",
    "multilingual",
    "arithmetic",
    "biology",
    "history",
    "law",
    "python",
    "chemistry",
    "news",
    "novels",
    "medicine",
)


def _normal(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
