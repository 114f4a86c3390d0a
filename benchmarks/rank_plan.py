"""What rank_consistency.py trains and scores, and how big: profiles, the models of one base, and where they are kept.

Every model is made once: weights are kept as .npy and scores as lines of scores.jsonl, so that a stop loses one model at most.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from rank_data import Difficulty, Suite, skill_suite, text_suite
from rank_models import Lab, Size

from megatron_demix.artifact import fingerprint
from megatron_demix.errors import Incomplete

NUM_REFERENCES = 24
SEEDS = (0, 1)
COMPONENT_SEED, REFERENCE_SEED, TRAINED_SEED = 1000, 3000, 4000
"""Runs of one kind share their seed, as the runs of a study do, so that they see the same text where their mixtures allow."""
CONCENTRATION = 0.5
"""Of the Dirichlet distribution of merge weights: well below 1, so that references differ."""
ANCHOR = 0.5
OTHER_ANCHORS = (0.0, 0.25)
TRAINED_LENGTHS = (0.125, 0.25, 0.5)
"""Of a trained proxy, in parts of the horizon. All proxies of a length together cost what the components cost ..."""
TRAINED_MORE = (0, 1)
"""... or so many models more: scores that go through the trained centroid cost one more, too."""
AVERAGED = {"averaged before the decay": (0.6, 0.65, 0.7, 0.75), "averaged over the decay": (0.85, 0.9, 0.95, 1.0)}
SHORTER = (0.125, 0.25, 0.5)


@dataclass(frozen=True)
class SuitePlan:
    """bases: (seed, steps) of each base; steps are branch points of one run where seeds repeat."""

    size: Size
    bases: tuple[tuple[int, int], ...]
    base_lr: float
    lr: float
    horizon: int
    """Steps of a component and of a reference, after the base."""
    eval_windows: int
    train_bytes: int
    difficulty: Difficulty | None = None
    """Of the skills; None: the text suite."""
    costly: bool = True
    """Also what needs many more components: an anchor of one domain, and a component for each pair of domains."""
    draw: int = 0
    """Another number draws other mixtures, and other seeds of all runs after the base."""

    def data(self) -> Suite:
        if self.difficulty is None:
            return text_suite(self.size.seq_length, self.eval_windows, self.train_bytes)
        return skill_suite(self.size.seq_length, self.eval_windows, self.train_bytes, self.difficulty)

    def steps(self, share: float) -> int:
        return max(1, round(share * self.horizon))


PROFILES: dict[str, dict[str, SuitePlan]] = {
    "cpu": {
        "text": SuitePlan(Size(2, 48, 4, 64, 8), ((1, 800), (2, 800), (3, 800)), 3e-3, 1e-3, 240, 64, 1_000_000),
        "skills": SuitePlan(
            Size(2, 64, 4, 64, 8),
            ((1, 800), (1, 1400), (1, 2000)),
            3e-3,
            1.5e-3,
            400,
            64,
            1_000_000,
            Difficulty(4, 2),
            costly=False,
        ),
    },
    "smoke": {
        "text": SuitePlan(Size(1, 16, 2, 32, 4), ((1, 8), (2, 8)), 3e-3, 1e-3, 16, 8, 50_000),
        "skills": SuitePlan(
            Size(1, 16, 2, 32, 4), ((1, 8), (1, 16)), 3e-3, 1e-3, 16, 8, 50_000, Difficulty(3, 1), costly=False
        ),
    },
    "gpu": {
        "text": SuitePlan(Size(8, 512, 8, 256, 64), ((1, 4000), (2, 4000), (3, 4000)), 6e-4, 3e-4, 1500, 128, 4_000_000),
        "skills": SuitePlan(
            Size(8, 512, 8, 256, 64), ((1, 2000), (1, 6000), (1, 12000)), 6e-4, 3e-4, 3000, 128, 20_000_000, Difficulty(12, 6)
        ),
    },
}
for _draw, (_name, _bases) in enumerate(
    {
        "replication": {"text": ((4, 800), (5, 800), (6, 800)), "skills": ((2, 800), (2, 1400), (2, 2000))},
        "third": {"text": ((7, 800), (8, 800), (9, 800)), "skills": ((3, 800), (3, 1400), (3, 2000))},
    }.items(),
    start=1,
):
    PROFILES[_name] = {
        suite: replace(PROFILES["cpu"][suite], bases=bases, costly=False, draw=_draw) for suite, bases in _bases.items()
    }


def to_weights(shares_MD: np.ndarray, anchor_D: np.ndarray, anchor_share: float) -> np.ndarray:
    """Merge weights whose merge stands for actual shares. Negative where a share lies below what the anchor gives."""
    return (shares_MD - anchor_share * anchor_D) / (1 - anchor_share)


class Clock:
    """Raises Incomplete between two models once the time is up."""

    def __init__(self, seconds: float | None) -> None:
        self._end = time.monotonic() + seconds if seconds else None

    def check(self) -> None:
        if self._end and time.monotonic() > self._end:
            raise Incomplete("the time is up and all finished models are saved: run the same command again to go on.")


class Bench:
    """All models of one base of a suite: `number` counts the plan's bases."""

    def __init__(self, plan: SuitePlan, suite: Suite, lab: Lab, number: int, work: Path, clock: Clock) -> None:
        self.plan, self.suite, self.lab, self.number, self._clock = plan, suite, lab, number, clock
        self._work = work / fingerprint(asdict(plan))[:12] / str(number)
        self._work.mkdir(parents=True, exist_ok=True)
        self.uniform_D = np.full(len(suite.domains), 1 / len(suite.domains))
        self.known = self._read()

    def _read(self) -> dict[str, dict[str, float]]:
        rows = {}
        path = self._work / "scores.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut short by a kill
            rows[row["model"]] = row["scores"]
        return rows

    def _keep(self, name: str, scores: dict[str, float]) -> dict[str, float]:
        with open(self._work / "scores.jsonl", "a") as file:
            file.write("\n" + json.dumps({"model": name, "scores": scores}))
        self.known[name] = scores
        return scores

    def score(self, name: str, weights: Callable[[], np.ndarray]) -> dict[str, float]:
        """A model's scores; weights are asked for where they are not known yet."""
        if name not in self.known:
            self._clock.check()
            self._keep(name, self.lab.scores(weights(), self.suite))
        return self.known[name]

    def score_by(self, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Scores that no single model has."""
        if name not in self.known:
            self._clock.check()
            self._keep(name, make())
        return self.known[name]

    # --- mixtures: the same whatever was trained before ---------------------------------------------------------------

    def _drawn(self, num: int, purpose: int) -> np.ndarray:
        """Actual shares [num, D] within reach of the default anchor."""
        rng = np.random.default_rng([purpose, self.number + 100 * self.plan.draw])
        weights_MD = rng.dirichlet(np.full(len(self.uniform_D), CONCENTRATION), num)
        return ANCHOR * self.uniform_D + (1 - ANCHOR) * weights_MD

    @cached_property
    def references_MD(self) -> np.ndarray:
        return self._drawn(NUM_REFERENCES, 1)

    def trained_MD(self, length: float, more: int = 0) -> np.ndarray:
        """Those that cost more begin with those that cost less."""
        num = round((len(self.suite.domains) + more) * self.plan.horizon / self.plan.steps(length))
        return self._drawn(num, 2 + TRAINED_LENGTHS.index(length))

    # --- training ---------------------------------------------------------------------------------------------------

    def weights(self, name: str, step: int, make: Callable[[], Mapping[int, np.ndarray]]) -> np.ndarray:
        """Weights of `name` after `step` steps. make returns them at all steps that are kept."""
        path = self._work / f"{name}@{step}.npy"
        if not path.exists():
            self._clock.check()
            for at, vector_N in make().items():
                temporary = self._work / f".{name}@{at}.npy"
                np.save(temporary, vector_N)
                os.rename(temporary, self._work / f"{name}@{at}.npy")
        return np.load(path)

    @cached_property
    def base(self) -> np.ndarray:
        seed, steps = self.plan.bases[self.number]

        def make() -> dict[int, np.ndarray]:
            uniform = dict(zip(self.suite.domains, self.uniform_D, strict=True))
            start_N = self.lab.initial(seed)
            return self.lab.train(start_N, self.suite, uniform, steps, seed, self.plan.base_lr, decay=False)

        return self.weights("base", steps, make)

    def run(self, shares_D: Sequence[float], steps: int, seed: int, save_at: Sequence[int] = ()) -> dict[int, np.ndarray]:
        shares = dict(zip(self.suite.domains, shares_D, strict=True))
        seed += 100 * self.plan.draw
        return self.lab.train(self.base, self.suite, shares, steps, seed, self.plan.lr, save_at=save_at)

    def components(self, anchor_D: np.ndarray, anchor_share: float, label: str, at: float = 1.0) -> list[np.ndarray]:
        """K weight vectors after that part of the horizon."""
        kept = sorted({self.plan.steps(p) for p in (*SHORTER, *(p for parts in AVERAGED.values() for p in parts))})
        result = []
        for k, domain in enumerate(self.suite.domains):
            shares_D = anchor_share * anchor_D + (1 - anchor_share) * np.eye(len(anchor_D))[k]

            def make(shares_D=shares_D) -> dict[int, np.ndarray]:
                return self.run(shares_D, self.plan.horizon, COMPONENT_SEED, kept)

            result.append(self.weights(f"component-{label}-{domain}", self.plan.steps(at), make))
        return result

    def mixed(self, members: Sequence[int], seed: int = 0) -> np.ndarray:
        """A component trained on equal merge weights of some domains: the centroid if of all."""
        weights_D = np.eye(len(self.uniform_D))[list(members)].mean(axis=0)
        shares_D = ANCHOR * self.uniform_D + (1 - ANCHOR) * weights_D
        name = f"mixed-{'+'.join(self.suite.domains[k] for k in members)}-{seed}"
        return self.weights(name, self.plan.horizon, lambda: self.run(shares_D, self.plan.horizon, COMPONENT_SEED + seed))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(len(self.uniform_D)), 2))

    def reference(self, m: int, seed: int) -> dict[str, float]:
        def make() -> np.ndarray:
            return self.run(self.references_MD[m], self.plan.horizon, REFERENCE_SEED + seed)[self.plan.horizon]

        return self.score(f"reference-{m}-{seed}", make)

    def trained(self, length: float, m: int) -> dict[str, float]:
        steps = self.plan.steps(length)
        shares_D = self.trained_MD(length, max(TRAINED_MORE))[m]
        return self.score(f"trained-{length}-{m}", lambda: self.run(shares_D, steps, TRAINED_SEED)[steps])
