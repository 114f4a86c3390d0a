"""A small invented study: nothing is trained, so every number is chosen by the test."""

import random

import pytest

from megatron_demix.report.data import (
    BlendRow,
    Choice,
    Cost,
    Domain,
    FinalRun,
    Fit,
    FrontPoint,
    Optimum,
    Proxy,
    ReportData,
    Round,
)


@pytest.fixture(scope="session")
def whole() -> ReportData:
    rng = random.Random(0)

    def one_round(number: int) -> Round:
        weights = [rng.random() for _ in range(6)]
        proxies = [
            Proxy(f"r{number}_{i}", {"code": w, "math": 1 - w}, {"code": 0.25 + w / 2, "math": 0.75 - w / 2})
            for i, w in enumerate(weights)
        ]
        scores = {p.name: {"code": 2 - p.shares["code"], "math": 3 - p.shares["math"]} for p in proxies}
        measured = [row["code"] for row in scores.values()]
        half_intervals = [0.0164] * len(measured)
        fits = {
            "code": Fit("quadratic", 0.99, 0.01, measured, measured, half_intervals),
            "math": Fit("ridge", 0.31, 0.2, measured, measured),
        }
        return Round(proxies, scores, fits)

    losses = {
        name: {"iteration": list(range(1, 30)), "lm loss": [7 / i + 2 for i in range(1, 30)]}
        for name in ("base", "components/code", "components/math", "final/found-seed0")
    }
    return ReportData(
        study="tiny <b>study</b>",
        settings={
            "name": "tiny",
            "model": {"num_layers": 2},
            "domains": [{"name": "code"}, {"name": "math"}],
            "rounds": [6, 6],
        },
        objective={"code": 3, "math": 1},
        domains=[
            Domain("code", 120, 30_000, 90_000, 0.75, 0.8, {"valid": (1234, 21), "test": (1300, 22)}),
            Domain("math", 60, 10_000, 31_000, 0.25, 1.6, {"valid": (432, 11), "test": (470, 12)}),
        ],
        losses=losses,
        rounds=[one_round(1), one_round(2)],
        choice=Choice(
            {"code": 0.6, "math": 0.4},
            {"code": 0.7, "math": 0.3},
            {"code": (1.4, 0.01), "math": (2.5, 0.02)},
            (1.675, 0.01),
            natural={"code": (1.3, 0.01), "math": (2.8, 0.02)},
            expected_gain=(0.05, 0.01),
            optimum=Optimum({"code": [0.58, 0.6, 0.62], "math": [0.42, 0.4, 0.38]}, 0.0004, (0.05, 0.01), 1.0),
            pareto=[FrontPoint({"code": c, "math": 1 - c}, {"code": 2 - c, "math": 2 + c}) for c in (0.4, 0.5, 0.6)],
            binding=["max_epochs of code: at most 60.0 % of the data."],
        ),
        final=[
            FinalRun(name, seed, {"code": loss + noise, "math": loss + noise})
            for name, loss in (("uniform", 1.3), ("found", 1.2), ("natural", 1.4))
            for seed, noise in ((1234, 0.0), (1235, 0.004))
        ],
        blends={
            "found": {"code": BlendRow(600, 601, 601, 0.8, 12), "math": BlendRow(400, 300, 300, 1.6, 7)},
            "natural": {"code": BlendRow(600, 600, 594, 0.8, 12), "math": BlendRow(200, 200, 390, 1.6, 7)},
            "uniform": {"code": BlendRow(500, 500, 501, 0.8, 12), "math": BlendRow(500, 500, 499, 1.6, 7)},
        },
        costs=[Cost("base", "1 trained", 4000, 3e9), Cost("rounds", "24 scored", 9600, 1e9)],
        timings_s={"base": 10.0, "components/code": 61.0, "components/math": 62.0},
    )
